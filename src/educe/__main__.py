"""python -m educe"""

import sys

from educe.cli import main

sys.exit(main(sys.argv[1:]))
