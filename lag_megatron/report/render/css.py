"""The CSS of the page, for light and dark screens and for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --fore: #1b1f24; --soft: #5b6470; --rule: #d9dee4; --faint: #eef1f4;
  --win: #0a58ca; --winback: #e8f0fe; --lag0: #b3470b; --plain: #8b95a1; --train: #9aa4b0;
  --copy: #cfe0fb; --fresh: #fbe6d3; --bad: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --fore: #e4e8ec; --soft: #9aa5b1; --rule: #343b43; --faint: #22272d;
    --win: #7db1ff; --winback: #1b2a40; --lag0: #f0a060; --plain: #76808c; --train: #66707b;
    --copy: #2b4775; --fresh: #5a3d22; --bad: #ff8a80;
  }
}
body { background: var(--back); color: var(--fore); margin: 0;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 24px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 16px; margin: 28px 0 8px; }
p { margin: 6px 0; max-width: 80ch; }
p.small, figcaption { color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 12px 0; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0; }
th { text-align: left; color: var(--soft); font-weight: 500; vertical-align: bottom; }
th, td { padding: 3px 9px; border-bottom: 1px solid var(--faint); }
thead th { border-bottom: 1px solid var(--rule); }
td { white-space: nowrap; }
th:first-child, td:first-child { padding-left: 6px; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.win td { background: var(--winback); font-weight: 600; }
tr.failed td { color: var(--bad); }
td svg { display: block; }
figure { margin: 8px 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 640px; height: auto; }
figure svg.ranks { max-width: 800px; }
figure.png { display: inline-block; vertical-align: top; width: calc(50% - 10px);
  margin: 8px 3px; }
figure.png.scatter { width: 100%; }
figure.png img { display: block; width: 100%; height: auto; border-radius: 4px; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--soft); }
svg text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--fore);
  font-variant-numeric: tabular-nums; white-space: pre; }
svg .tick, svg .label, svg .marktext, svg .leveltext { fill: var(--soft); }
svg .grid { stroke: var(--faint); }
svg .axis { stroke: var(--soft); }
svg .mark { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .level { stroke: var(--soft); stroke-dasharray: 8 3 2 3; }
svg .line { fill: none; stroke: var(--plain); stroke-width: 1.1; stroke-linejoin: round; }
svg .line.train { stroke: var(--train); stroke-width: 1; }
svg .line.random { stroke-dasharray: 1.5 3; stroke-width: 1.4; }
svg .line.win { stroke: var(--win); stroke-width: 2.6; }
svg .line.lag0 { stroke: var(--lag0); stroke-width: 2.2; stroke-dasharray: 7 4; }
svg .line.failed { stroke: var(--bad); stroke-dasharray: 4 2 1 2; }
svg .dot { fill: var(--plain); }
svg .dot.win, svg .end.win { fill: var(--win); }
svg .dot.lag0, svg .end.lag0 { fill: var(--lag0); }
svg .end.win, svg .end.lag0 { font-weight: 600; }
svg rect.old { fill: none; stroke: var(--plain); }
svg rect.copy { fill: var(--copy); stroke: var(--win); }
svg rect.fresh { fill: var(--fresh); stroke: var(--lag0); stroke-dasharray: 3 2; }
svg .layer { font-size: 10px; }
svg.narrow .layer { font-size: 8.5px; }
@media (max-width: 700px) { figure.png { width: 100%; margin: 8px 0; } }
@media print { main { max-width: none; padding: 0; } details { display: block; } }
"""
