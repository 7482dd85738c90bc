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
