"""What a report says to someone who sees one for the first time, and how it looks."""

from __future__ import annotations

from educe.measurement.support import DELTA

STYLE = """
header { position: static; }
figure { margin: 12px 0 4px; }
figure img { width: 100%; height: auto; border-radius: 8px; background: #fff; }
figcaption, .note { color: var(--soft); font-size: 15px; }
.sentence { font-size: 18px; margin: 10px 0; }
main h2 { font-size: 19px; color: var(--ink); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 10px 3px 0; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; }
.close td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0; color: var(--soft); }
"""

# What each picture shows, for someone who sees it for the first time.
CAPTIONS = {
  'pass_at_k': (
    'How often at least one of k samples is right, averaged over prompts, with 95 % '
    'intervals over prompts. If training only re-weighted what the base could do, the '
    'policy is ahead at small k and never behind at large k. Dashed: the base made surer '
    'of itself without training. Dotted: its majority vote.'
  ),
  'gains': (
    'The gain in the share of right samples, split by what the base could already do '
    'when given k samples. Blue: prompts that k samples of the base solve almost surely. '
    'Orange: prompts that they do not. Grey: the samples at hand cannot tell. Where other '
    'prompts lost, the shares pass 100 % and are drawn to one whole.'
  ),
  'prompts': 'Each point is a prompt. Above the line it was gained, below it was lost.',
  'support': (
    'Of the prompts that k samples of the base solve, the share that k samples of the '
    'policy solve too; and of those that the policy solves, the share that is new. '
    'Dashed: the same if the base is compared with itself, which is what chance does.'
  ),
  'ledger': (
    'How far the policy went from its base, and for what. Being right more often has a '
    'least price; giving fewer of the right answers than before, and changes that no '
    'reward asked for, come on top. Where the base showed no right sample the first term '
    'is a guess, and rather too high.'
  ),
  'frontier': (
    'The line is the best that any policy can do at that distance from the base. A '
    'policy on it has only re-weighted the base by the reward.'
  ),
}

GLOSSARY = {
  'base, policy': 'the model before, and the model after, the training in question',
  'right': 'a sample to which the verifier gives a reward of 1 or more',
  'elicited': (
    'gained on prompts that the base itself solves within the budget of samples: what '
    'was there was drawn out'
  ),
  'created': 'gained on prompts that it does not solve within so many samples',
  'tilt, Gibbs policy': (
    'the base with every right answer made likelier by one and the same factor: what '
    're-weighting alone can do'
  ),
  'sharpened, p^α': (
    'the base with all its probabilities raised to a power α, chosen on one half of the '
    'prompts and judged on the other'
  ),
  'SRR, NDR, NSCR': (
    'of prompts solved in k samples: the share of the base’s that is kept; of the '
    'policy’s, the share that is new; the gained less the lost, of all'
  ),
  'budget': (
    f'a number of samples k: a prompt is within it if k samples of the base show a right '
    f'answer with a chance of {DELTA:.0%}'
  ),
  'nat': 'a factor of e = 2.718 in probability; KL is the mean number of nats between the '
  'probabilities that policy and base give to what the policy writes',
  'interval': '95 %, over prompts: what other prompts of this kind may well have shown',
}
