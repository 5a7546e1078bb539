"""Nothing that a report shows or says goes without an explanation."""

from educe.measurement import report_figures, report_words


def test_every_picture_has_a_caption():
  assert report_words.CAPTIONS.keys() == report_figures.PANELS.keys()


def test_the_words_of_the_verdict_are_explained():
  explained = ' '.join(report_words.GLOSSARY)
  for word in (
    'base',
    'policy',
    'right',
    'elicited',
    'created',
    'budget',
    'tilt',
    'nat',
  ):
    assert word in explained
  for term in ('SRR', 'NDR', 'NSCR', 'p^α', 'interval'):
    assert term in explained
