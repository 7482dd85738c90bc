"""Style and script of a report's page: system fonts, light and dark, narrow and wide, screen and paper."""

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; --card: #f6f8fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; --card: #151b23; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
p { margin: 0.5rem 0; max-width: 70ch; }
li { max-width: 70ch; margin: 0.25rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 0.75rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.9rem 1rem;
  display: flex; flex-direction: column; }
.tile .label { color: var(--soft); font-size: 0.85rem; }
.tile .value { font-size: 1.7rem; font-weight: 650; line-height: 1.3; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tile .detail { color: var(--soft); font-size: 0.85rem; margin-top: auto; }
figure { margin: 0.5rem 0 1rem; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 8px; }
figcaption { color: var(--soft); font-size: 0.875rem; margin-top: 0.4rem; max-width: 80ch; }
figure img[hidden] { display: none; }
.plot.live { overflow-x: auto; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.9rem 0.35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
table:not(.numbers) tbody th { color: var(--soft); white-space: nowrap; width: 1%; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.75rem 1rem;
  overflow-x: auto; font-size: 0.85rem; line-height: 1.45; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--soft); padding: 0.25rem 0; }
summary:hover { color: var(--ink); }
@media print {
  main { max-width: none; padding: 0; }
  section, figure { break-inside: avoid; }
}
"""

# The library travels compressed. Each picture stays until its figure is drawn, so that a browser without scripts, or
# too old to unpack, still shows the whole page.
SCRIPT = """
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function bringToLife() {
  const library = document.createElement("script");
  library.textContent = await unpack(document.getElementById("library").textContent);
  document.head.append(library);
  for (const plot of document.querySelectorAll(".plot")) {
    const data = plot.querySelector("script[type='application/json']");
    if (!data) continue;
    const spec = JSON.parse(data.textContent);
    const box = document.createElement("div");
    // Narrower than this, panels side by side would overlap: the figure then scrolls sideways on its own.
    if (spec.layout.xaxis2) box.style.minWidth = "620px";
    spec.layout.font.color = getComputedStyle(document.querySelector("figcaption")).color;
    plot.append(box);
    plot.classList.add("live");
    const picture = plot.querySelector("img");
    picture.hidden = true;
    try {
      await Plotly.newPlot(box, spec.data, spec.layout, {responsive: true, displayModeBar: false});
    } catch (error) {
      console.error(error);
      box.remove();
      picture.hidden = false;
    }
  }
}

bringToLife();
"""
