#!/usr/bin/env bash
# stoppable.sh command …: runs it and hands SIGTERM on. Where that came, the exit code is
# 143 even though the command saved and ended well: to Kubernetes and the like 0 would say
# that the work is done, and nobody would start the rest of it.
set -u
stopped=
"$@" &
pid=$!
trap 'stopped=1; kill -TERM "$pid" 2>/dev/null' TERM
wait "$pid"
code=$?
while kill -0 "$pid" 2>/dev/null; do  # the signal ended the wait, not the command
  wait "$pid"
  code=$?
done
if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then code=143; fi
exit "$code"
