"""The page's style: one column, cards; on narrow screens tables are stacked."""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #22303c;
  background: #f4f6f7;
  margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 0 0 4px; }
p.note { color: #5d6b78; margin: 0 0 10px; font-size: 13.5px; max-width: 100ch; }
section { background: #fff; border: 1px solid #dfe5e9; border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; }
img.figure { width: 100%; height: auto; display: block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 10px;
  margin-top: 16px; }
.tile { background: #fff; border: 1px solid #dfe5e9; border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.tile span { color: #5d6b78; font-size: 12.5px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: #5d6b78; font-weight: 600; border-bottom: 1px solid #cfd8de;
  padding: 4px 10px 4px 0; }
td { border-bottom: 1px solid #edf1f3; padding: 4px 10px 4px 0; vertical-align: top; }
td.n, th.n { text-align: right; padding-right: 22px; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr));
  gap: 12px; }
.sample { font-size: 12px; line-height: 1.35; color: #47545f; }
.sample img, .sample .none { width: 100%; aspect-ratio: 1; image-rendering: pixelated;
  border-radius: 5px; background: #e6ebee;
  display: block; margin-bottom: 4px; object-fit: contain; }
.kind { display: inline-block; border-radius: 4px; padding: 0 7px; background: #e6ebee;
  font-size: 12px; }
.kind.edit { background: #dcebf3; } .kind.undo, .kind.deny { background: #f7e2dc; }
.kind.checkpoint { background: #e3efd9; }
footer { color: #5d6b78; font-size: 12.5px; margin-top: 20px; }
.map { position: relative; }
.map svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.map circle { fill: transparent; }
.map text { display: none; font-size: 20px; fill: #22303c; stroke: #fff; stroke-width: 6px;
  paint-order: stroke; pointer-events: none; }
.map g { outline: none; cursor: pointer; }
.map g:hover text, .map g:focus text { display: block; }
.map g:hover circle, .map g:focus circle { stroke: #22303c; stroke-width: 2px; }
@media (max-width: 640px) {
  main { padding: 16px 10px 40px; } section { padding: 14px 12px; }
  .map text { font-size: 44px; }
  table, tbody, tr, td { display: block; } thead { display: none; }
  tr { border-bottom: 1px solid #cfd8de; padding: 6px 0; }
  td, td.n { border: 0; padding: 1px 0; text-align: left; overflow-wrap: anywhere; }
  td:empty { display: none; }
  td::before { content: attr(data-name) " "; color: #5d6b78; }
}
"""
