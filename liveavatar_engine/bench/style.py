"""The style sheet of the HTML report, for light and dark."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1d2329; --dim: #5b6770; --grid: #dfe4e8; --accent: #2563a8;
  --warn: #a33a12; --deadline: #c2341d; --p50: #1d7a4c; --p99: #8a4fb0; --mark: #000000; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --text: #e6eaee; --dim: #9aa6b0; --grid: #333c44;
  --accent: #6aa9ec; --warn: #f09a73; --deadline: #ff7a63; --p50: #5fcf97; --p99: #c79be8; --mark: #ffffff; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
.warning { color: var(--warn); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child, td:last-child { text-align: left; white-space: normal; } th { color: var(--dim); }
figure { margin: 1.5rem 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; } svg text { fill: var(--text); }
svg text { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg text.inside { fill: #ffffff; stroke: none; pointer-events: none; }
svg rect { stroke: var(--page); stroke-width: 1; }
.grid { stroke: var(--grid); } .bar { fill: var(--accent); }
.trace { fill: none; stroke: var(--accent); stroke-width: 1.2; opacity: .6; } .point { fill: var(--accent); }
.deadline { stroke: var(--deadline); stroke-width: 1.6; stroke-dasharray: 7 4; }
.p50 { stroke: var(--p50); stroke-width: 1.4; } .p99 { stroke: var(--p99); stroke-width: 1.4; stroke-dasharray: 2 3; }
.mark { stroke: var(--mark); stroke-width: 2.4; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .3rem 0; }
.key { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border-radius: 2px; }
.key.line { background: var(--mark); width: .2em; margin-left: .35em; margin-right: .75em; }
.notes { color: var(--dim); }
.linear0 { fill: #17437a; background: #17437a; } .linear1 { fill: #1f5fa8; background: #1f5fa8; }
.linear2 { fill: #2f7abf; background: #2f7abf; } .linear3 { fill: #3f86a8; background: #3f86a8; }
.linear4 { fill: #2b6e86; background: #2b6e86; } .linear5 { fill: #1c5468; background: #1c5468; }
.attention0 { fill: #8a5a12; background: #8a5a12; } .attention1 { fill: #b3541e; background: #b3541e; }
.attention2 { fill: #c2703d; background: #c2703d; } .audio0 { fill: #2c7a4b; background: #2c7a4b; }
.audio1 { fill: #4c9464; background: #4c9464; } .norm0 { fill: #6d4599; background: #6d4599; }
.norm1 { fill: #97569f; background: #97569f; } .other0 { fill: #4d5b66; background: #4d5b66; }
.turn0 { fill: #1f5fa8; background: #1f5fa8; } .turn1 { fill: #b3541e; background: #b3541e; }
.turn2 { fill: #2c7a4b; background: #2c7a4b; } .turn3 { fill: #6d4599; background: #6d4599; }
.turn4 { fill: #2b6e86; background: #2b6e86; } .turn5 { fill: #8a5a12; background: #8a5a12; }
.prefill { fill: #4d5b66; background: #4d5b66; }
.bubble { fill: none; background: none; stroke: var(--deadline); stroke-dasharray: 3 3; }
svg rect.bubble { stroke: var(--deadline); }
.other1 { fill: #6b7a85; background: #6b7a85; } .other2 { fill: #8b969e; background: #8b969e; }
"""
