"""The looks and the behaviour that every page shares."""

from __future__ import annotations

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: nothing may be loaded."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --soft: #59626d; --line: #d9dde2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8eb; --soft: #a3abb5; --line: #353b43; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { display: inline; font-size: 1.2rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 75ch; }
.lead { font-size: 1.15rem; }
.note, figcaption { color: var(--soft); }
figure { margin: 1rem 0; min-width: 0; }
figcaption { font-size: .9rem; max-width: 75ch; }
.pair { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pair > * { min-width: 0; }
.plot { width: 100%; }
.plot text { fill: var(--ink) !important; }
.plot .hoverlayer path { fill: var(--paper) !important; stroke: var(--soft) !important; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.wide { white-space: normal; }
tr.strong td { font-weight: 600; }
section { margin-top: 1.5rem; border-top: 1px solid var(--line); padding-top: .75rem; }
details { margin: .75rem 0; }
section > details { margin: 0; }
summary { cursor: pointer; }
section > details > summary { padding: .25rem 0; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.4; }
button { font: inherit; font-size: .9rem; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: .3rem; padding: .2rem .7rem; cursor: pointer; }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  button { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; }
  figure, tr { break-inside: avoid; }
  summary, h3 { break-after: avoid; }
  .pair { display: block; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  pre { white-space: pre-wrap; font-size: 8pt; }
}
"""

SCRIPT = """
const paperPixels = 660;

async function unpacked(element) {
  const bytes = Uint8Array.from(atob(element.textContent), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// A folded section has no width to draw in: its figures wait until it is opened.
function drawVisible() {
  for (const plot of document.querySelectorAll(".plot:not(.drawn)")) {
    if (plot.closest("details:not([open])")) continue;
    plot.classList.add("drawn");
    const {data, layout} = JSON.parse(plot.nextElementSibling.textContent);
    Plotly.newPlot(plot, data, layout, {responsive: true, displayModeBar: false});
  }
}

const folded = () => [...document.querySelectorAll("details:not([open])")];
let openedForPaper = [];

addEventListener("DOMContentLoaded", async () => {
  const button = document.querySelector("button");
  button?.addEventListener("click", () => folded().forEach(details => details.open = true));
  const library = document.createElement("script");
  try {
    library.textContent = await unpacked(document.getElementById("plotly"));
  } catch (error) {
    for (const plot of document.querySelectorAll(".plot")) {
      plot.textContent = "This browser is too old to draw the figures; the tables hold the figures that matter.";
    }
    return;
  }
  document.head.append(library);
  drawVisible();
  document.addEventListener("toggle", drawVisible, true);
  addEventListener("beforeprint", () => {
    openedForPaper = folded();
    openedForPaper.forEach(details => details.open = true);
    drawVisible();
    document.querySelectorAll(".drawn").forEach(plot => Plotly.relayout(plot, {width: paperPixels}));
  });
  addEventListener("afterprint", () => {
    document.querySelectorAll(".drawn").forEach(plot => Plotly.relayout(plot, {width: null, autosize: true}));
    openedForPaper.forEach(details => details.open = false);
  });
  document.documentElement.dataset.drawn = "yes";
});
"""
"""Unpacks plotly.js, draws each figure once it can be seen, and opens everything for the printer."""
