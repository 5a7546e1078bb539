"""The empty page that transcripts and reports fill: markup, style, some lines of script."""

from __future__ import annotations

import string

# The content policy forbids everything from outside, whatever a transcript says.
PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$name</title>
<style>$style</style>
</head>
<body class="advantages log_ratio">
<header>
<h1>$title</h1>
<ul class="counts">
$counts
</ul>
$legend
</header>
<main>
$groups
</main>
<output id="note" hidden></output>
<script>$script</script>
</body>
</html>
""")

# --a and --r, 0..1, are how strongly a token is coloured; its class says which way: blue
# above zero, orange below.
STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2a30; --soft: #5b6a72; --paper: #fff; --card: #f5f7f8; --line: #dde3e6;
  --plus: #7db4f0; --minus: #f5a766;
  --good: #0b57a4; --bad: #a63c06; --other: #55616a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4eaed; --soft: #9fb0b9; --paper: #12181b; --card: #1b2327; --line: #303b41;
    --plus: #2468b4; --minus: #a8500f;
    --good: #7db8f7; --bad: #f6a86b; --other: #a9b7bf;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 0 16px 64px; max-width: 860px;
  color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
  -webkit-text-size-adjust: 100%;
}
h1 { margin: 20px 0 8px; font-size: 22px; overflow-wrap: anywhere; }
header {
  position: sticky; top: 0; z-index: 1; padding-bottom: 8px;
  background: var(--paper); border-bottom: 1px solid var(--line);
}
.counts { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; padding: 0; }
.counts li { list-style: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; margin-top: 6px; font-size: 14px; }
.legend small, .prompt small { color: var(--soft); }
.scale { color: var(--soft); font-variant-numeric: tabular-nums; }
.scale i {
  display: inline-block; width: 72px; height: 12px; margin: 0 6px; border-radius: 3px;
  background: linear-gradient(90deg, var(--minus), var(--paper), var(--plus));
}
.scale i.log_ratio {
  height: 3px; vertical-align: middle;
  background: linear-gradient(90deg, var(--bad), var(--paper), var(--good));
}
section { margin-top: 28px; }
h2 { margin: 0 0 6px; font-size: 15px; color: var(--soft); overflow-wrap: anywhere; }
.rewards { margin-left: 4px; font-variant-numeric: tabular-nums; }
.rewards .outcome { margin-right: 4px; }
.prompt, .completion { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--soft); max-height: 14em; overflow-y: auto; }
.prompt small { text-transform: uppercase; font-size: 11px; letter-spacing: .06em; }
.answer { margin: 4px 0; }
article {
  margin: 10px 0; padding: 8px 12px 10px; background: var(--card); border-radius: 8px;
}
.facts {
  margin: 0 0 4px; font-size: 14px; color: var(--soft);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.facts b { color: var(--ink); }
.completion { line-height: 1.75; }
.outcome { font-weight: 600; color: var(--other); }
.outcome.verified { color: var(--good); }
.outcome.wrong { color: var(--bad); }
.outcome.verified::before { content: '✓ '; }
.outcome.wrong::before { content: '✗ '; }
.control {
  padding: 0 2px; border: 1px solid var(--line); border-radius: 3px;
  font: 11px ui-monospace, monospace; color: var(--soft);
}
.t { border-radius: 2px; cursor: help; }
.advantages .t {
  background: color-mix(in srgb, var(--hue, transparent) calc(var(--a, 0) * 100%), #0000);
}
.log_ratio .t {
  padding-bottom: 2px;
  border-bottom: 3px solid
    color-mix(in srgb, var(--line-hue, transparent) calc(var(--r, 0) * 100%), #0000);
}
.t.a-plus { --hue: var(--plus); }
.t.a-minus { --hue: var(--minus); }
.t.r-plus { --line-hue: var(--good); }
.t.r-minus { --line-hue: var(--bad); }
.t.on { outline: 2px solid var(--ink); }
#note {
  position: fixed; left: 0; right: 0; bottom: 0; padding: 10px 16px; font-size: 15px;
  text-align: center; color: var(--paper); background: var(--ink);
}
#note[hidden] { display: none; }
@media (max-width: 600px) {
  header { position: static; }
  body { padding: 0 12px 64px; }
  article { padding: 8px 10px; }
}
"""

# A phone has no hover: a tap shows the note of a token. Boxes switch a colouring off.
SCRIPT = """
const note = document.getElementById('note');
document.addEventListener('click', event => {
  const token = event.target.closest('.t');
  document.querySelectorAll('.t.on').forEach(each => each.classList.remove('on'));
  note.hidden = !token;
  if (token) { token.classList.add('on'); note.textContent = token.title; }
});
document.querySelectorAll('[data-show]').forEach(box => {
  const show = () => document.body.classList.toggle(box.dataset.show, box.checked);
  box.addEventListener('change', show);
  show();
});
"""
