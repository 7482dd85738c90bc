"""The course as a reader meets it: in JupyterLab with a kernel, and as pages without one, in a real browser.

`make browser` runs these; they need playwright and a Chromium (CHROMIUM names one; the system's is found). Screenshots
go to `build/browser/`, to be looked at.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultralong.course import site, workspace

sync_api = pytest.importorskip("playwright.sync_api", reason="make browser installs playwright")
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = Path(__file__).resolve().parents[2] / "build" / "browser"
PATIENCE = 600_000  # milliseconds for a notebook's cells: trainings, on a machine that may be busy
WIDTHS = (1280, 400)

# An exercise of each notebook: a wrong answer, what its hint says, and a right one, as a learner would type them.
ANSWERS = {
    "00_quickstart": (
        "00.factor",
        "def my_factor(window, longest):\n    return longest // window",
        "round up",
        "def my_factor(window, longest):\n    return -(-longest // window)",
    ),
    "06_sequence_parallel": (
        "06.zigzag",
        "def my_zigzag(rank, ranks):\n    return 2 * rank, 2 * rank + 1",
        "an early one and a late one",
        "def my_zigzag(rank, ranks):\n    return rank, 2 * ranks - 1 - rank",
    ),
    "07_memory_and_the_trainer": (
        "07.states",
        "def my_state_bytes(parameters, gpus, eight_bit):\n"
        "    return parameters * (8 + (2 * (1 + 4 / 256) if eight_bit else 8))",
        "FSDP shards all three",
        "def my_state_bytes(parameters, gpus, eight_bit):\n"
        "    return parameters * (8 + (2 * (1 + 4 / 256) if eight_bit else 8)) / gpus",
    ),
    "12_many_hosts": (
        "12.mesh",
        "def my_mesh(hosts, gpus, tokens, most):\n    return hosts * gpus, 1",
        "leave fewer rows",
        "def my_mesh(hosts, gpus, tokens, most):\n"
        "    world = hosts * gpus\n"
        "    share = next(n for n in range(1, world + 1) if world % n == 0 and tokens <= n * most)\n"
        "    return share, world // share",
    ),
}
# Where the slider's handle stands when a frame has just been drawn, and where it rests.
HANDLE = """async gd => {
    const left = () => gd.querySelector('.slider-grip-rect').getBoundingClientRect().x;
    const drawn = new Promise(
        done => gd.once('plotly_animatingframe', () => requestAnimationFrame(() => done(left()))));
    Plotly.animate(gd, ...gd.layout.sliders[0].steps[0].args);
    const found = await drawn;
    await new Promise(done => setTimeout(done, 500));
    return [found, left()];
}"""
TRACEBACK = "Traceback (most recent call last)"
STATE = "[...gd.data].map(trace => [trace.x, trace.y, trace.z, trace.text]), gd.layout.shapes, gd.layout.annotations"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        SHOTS.mkdir(parents=True, exist_ok=True)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab in a learner's work folder, with settings of its own."""
    place = tmp_path_factory.mktemp("lab")
    workspace.start(place / "course", list(ANSWERS))
    settings = place / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # All cells stay in the page, so that each can be looked at without scrolling to it first.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    own = {name: str(place / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(place / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(place / "spaces")}
    own |= {"JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_OFFLINE": "1"}
    typed = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token="]
    log = (place / "lab.log").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *typed, "--ServerApp.disable_check_xsrf=True"],
        cwd=place / "course",
        env=os.environ | own,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    for _ in range(600):
        said = (place / "lab.log").read_text()
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", said):
            break
        assert server.poll() is None, said
        time.sleep(0.2)
    yield f"http://127.0.0.1:{found.group(1)}/lab"
    server.terminate()
    server.wait(30)
    log.close()


def resting(place):
    """The box of an element once it no longer moves: figures above it may be drawn later, and push it down."""
    box = None
    for _ in range(40):
        place.scroll_into_view_if_needed()
        before, box = box, place.bounding_box()
        if before is not None and box == before:
            return box
        place.page.wait_for_timeout(250)
    raise AssertionError("the page does not come to rest")


def drag_slider(page, picture):
    """Drag a figure's slider to its right end; AssertionError where the figure does not follow."""
    grip = resting(picture.locator(".slider-grip-rect").first)
    box = picture.locator(".slider-rail-touch-rect").first.bounding_box()
    before = picture.evaluate(f"gd => JSON.stringify([{STATE}])")
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    page.wait_for_timeout(600)
    last = picture.evaluate("gd => gd.layout.sliders[0].active === gd.layout.sliders[0].steps.length - 1")
    assert last, "the slider is not where it was dragged"
    assert picture.evaluate(f"gd => JSON.stringify([{STATE}])") != before, "the slider moved and the figure did not"


def animation(page):
    """The first figure with a slider that plotly has drawn; AssertionError where there is none."""
    found = page.locator(".js-plotly-plot").filter(has=page.locator(".slider-rail-touch-rect")).first
    try:
        found.wait_for(timeout=20_000)
    except sync_api.TimeoutError:
        raise AssertionError("no figure with a slider was drawn") from None
    return found


def wake_a_still(page):
    """Move the pointer over a stored notebook's first animation: its still gives way to the figure."""
    figures = page.locator(".jp-RenderedPlotly")
    try:
        figures.first.wait_for(state="attached", timeout=30_000)
    except sync_api.TimeoutError:
        raise AssertionError("JupyterLab shows no figure of plotly: is plotly installed beside jupyterlab?") from None
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        box = figure.bounding_box()
        page.mouse.move(box["x"] + 40, box["y"] + 40)
        page.mouse.move(box["x"] + 80, box["y"] + 60)
        page.wait_for_timeout(500)
        if page.locator(".slider-rail-touch-rect").count():
            return animation(page)
    raise AssertionError("no still of an animation became a figure under the pointer")


def answer(page, name, code):
    """Type an answer into its exercise's cell and run it; the cell."""
    cell = page.locator(".jp-CodeCell").filter(has_text=f'check("{name}"').first
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(f'{code}\n\n\ncheck("{name}", {code.split("(")[0].removeprefix("def ")})')
    page.keyboard.press("Control+Enter")
    return cell


def run_all(page):
    """Run, Run All Cells, by the menu; JupyterLab may ask for the kernel at any moment, and then runs nothing."""
    asked = page.locator(".jp-Dialog .jp-mod-accept")
    for attempt in range(120):
        if asked.count():
            asked.first.click()
            page.wait_for_timeout(5000)  # the kernel starts
        elif attempt % 40 == 8:
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        if "[*]:" in page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents():
            return
        page.wait_for_timeout(250)
    page.screenshot(path=SHOTS / "lab-not-running.png")
    raise AssertionError("no cell is waiting or running")


@pytest.mark.parametrize("name", list(ANSWERS))
def test_a_notebook_in_jupyterlab(lab, browser, name):
    """Run all, drag a slider, answer an exercise wrongly and rightly."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{lab}/tree/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)
    drag_slider(page, wake_a_still(page))
    run_all(page)
    page.wait_for_function(
        "() => ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(p => p.textContent == '[*]:')",
        timeout=PATIENCE,
    )
    failed = page.locator(".jp-OutputArea-output").filter(has_text=TRACEBACK)
    assert failed.count() == 0, failed.first.text_content()[-1500:]
    assert "[ ]:" not in page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents(), "a cell did not run"

    assert page.locator("img.plot-img:visible").count() == 0, "a live figure is drawn at once, without its still"
    drag_slider(page, animation(page))
    page.screenshot(path=SHOTS / f"lab-{name}-slider.png")

    exercise, wrong, hint, right = ANSWERS[name]
    cell = answer(page, exercise, wrong)
    error = cell.locator(".jp-OutputArea-output").filter(has_text=f"{exercise}: not yet.")
    error.wait_for(timeout=60_000)
    assert hint in error.text_content()
    assert TRACEBACK not in error.text_content(), "a learner sees the frames of the check"
    error.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / f"lab-{name}-wrong.png")
    answer(page, exercise, right)
    done = cell.locator(".jp-OutputArea-output").filter(has_text="ok")
    done.wait_for(timeout=60_000)
    assert error.count() == 0
    page.screenshot(path=SHOTS / f"lab-{name}-right.png")
    page.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return [path for path in site.build(folder) if path.parent == folder]


def test_every_page_of_the_site_without_a_kernel(pages, browser):
    """Light and dark, wide and narrow: nothing in the console, nothing cut off, a sentence for every picture."""
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    wrong = []
    for path in pages:
        page.set_viewport_size({"width": WIDTHS[0], "height": 900})
        page.emulate_media(color_scheme="light")
        page.goto(path.as_uri())
        bare = page.evaluate(
            "() => [...document.querySelectorAll('img, .figure')].filter(e => "
            "!((e.getAttribute('alt') ?? e.getAttribute('aria-label') ?? '').trim().length > 10)).length"
        )
        undrawn = page.evaluate("() => document.querySelectorAll('.figure:not(:has(.main-svg))').length")
        wrong += [f"{path.name}: {bare} pictures without a sentence"] * bool(bare)
        wrong += [f"{path.name}: {undrawn} figures not drawn"] * bool(undrawn)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.wait_for_timeout(150)
                over = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
                wrong += [f"{path.name}: {over} pixels too wide at {width}"] * (over > 1)
                if path.stem in ("index", *ANSWERS):
                    page.screenshot(path=SHOTS / f"site-{path.stem}-{width}-{scheme}.png", full_page=True)
    assert said == []
    assert wrong == []


def test_sliders_of_the_site_move_their_figures(pages, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for path in (path for path in pages if path.stem in ANSWERS):
        page.goto(path.as_uri())
        picture = animation(page)
        drag_slider(page, picture)
        found, rests = picture.evaluate(HANDLE)
        assert found == pytest.approx(rests), "the handle comes after the picture"
