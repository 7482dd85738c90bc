// The library travels compressed. Each picture stays until its figure is drawn, so that a browser without scripts, or
// too old to unpack, still shows the whole page.
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
    spec.layout.font.color = getComputedStyle(document.querySelector("figcaption")).color;
    // On a narrow screen each name of a legend takes a line of its own: the figure grows by as many.
    const named = spec.data.filter(trace => trace.name && trace.showlegend !== false).length;
    if (plot.clientWidth < 560 && named > 3) {
      spec.layout.height += 19 * named;
      spec.layout.legend.y = -72 / (spec.layout.height - 19 * named - 90);
    }
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
