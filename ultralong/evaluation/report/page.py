"""Pages by templates: everything is escaped, a page opens offline, and every figure is a still picture first."""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ultralong import figures
from ultralong.figures.show import plotly_json
from ultralong.utils.extras import require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDTH = 920  # pixels of a picture that has the page's width
HALF_WIDTH = 480
DRAWS = ("plotly.graph_objects", "PIL.Image", "matplotlib.figure")  # matplotlib imports PIL


@functools.cache
def templates() -> Environment:
    """The package's templates; every value that they show is escaped."""
    return Environment(
        loader=PackageLoader("ultralong.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(template: str, values: Mapping[str, Any], *, interactive: bool) -> str:
    """A page as a string of HTML that needs nothing beside it.

    Args:
        template: Name of the template.
        values: What it shows, `title` among them.
        interactive: True adds plotly's script.
    """
    library = plotly_library() if interactive and missing_for_figures() is None else ""
    return templates().get_template(template).render(**values, library=library)


@functools.cache
def plotly_library() -> str:
    """Plotly's script, compressed and in base 64."""
    library = require("plotly.offline", extra="notebooks").get_plotlyjs()
    # mtime=0: the same report gives the same bytes.
    return base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode()


def missing_for_figures() -> str | None:
    """What is missing to draw figures and the command that installs it, or None."""
    try:
        for module in DRAWS:
            require(module, extra="notebooks")
    except ImportError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Panel:
    """One figure of a group: its `name` above it, a `picture` (PNG in base 64) of a `width`, and plotly's `data`."""

    name: str
    picture: str
    width: int
    data: Mapping[str, Any] | None


@dataclass(frozen=True)
class Drawn:
    """Figures that belong together, with one sentence on what they show; `stacked` keeps them below each other."""

    alt: str
    panels: tuple[Panel, ...]
    stacked: bool = False


@dataclass(frozen=True)
class Drawer:
    """Draws figures for a page, or leaves them out where what draws them is not installed.

    Attributes:
        interactive: Add each figure's data for plotly's script.
    """

    interactive: bool

    @functools.cached_property
    def missing(self) -> str | None:
        """Why nothing is drawn, or None."""
        return missing_for_figures()

    def __call__(
        self, alt: str, *make: Callable[[], Figure], names: Sequence[str] = ("",), stacked: bool = False
    ) -> Drawn | None:
        """Draw figures side by side where there is room.

        Args:
            alt: What they show, in a sentence; printed under them as well.
            make: What gives each figure; called only where it can be drawn.
            names: Name of each.
            stacked: Keep them below each other, for figures that need the page's width.
        """
        if self.missing is not None:
            return None
        width = WIDTH if stacked or len(make) == 1 else HALF_WIDTH
        return Drawn(
            alt,
            tuple(_panel(name, one(), width, self.interactive) for name, one in zip(names, make, strict=True)),
            stacked,
        )


def _panel(name: str, figure: Figure, width: int, interactive: bool) -> Panel:
    scale = 1.5 if width == WIDTH else 2.0
    picture = base64.b64encode(figures.png_bytes(figure, width=width, scale=scale)).decode()
    return Panel(name, picture, width, plotly_json(figure) if interactive else None)


def figure_block(figure: Figure, alt: str, *, interactive: bool) -> str:
    """A figure as HTML: a picture that a script may bring to life.

    Args:
        figure: The figure.
        alt: What it shows, in a sentence; printed under it as well.
        interactive: True adds the figure's data for the script.
    """
    return _part("figure", Drawn(alt, (_panel("", figure, WIDTH, interactive),)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """An HTML table that scrolls sideways by itself on a narrow screen; cells are escaped.

    Args:
        head: Titles of the columns.
        rows: Text of the cells.
        numbers: True aligns all but the first column to the right.
    """
    return _part("table", head, list(rows), numbers)


def _part(macro: str, *values: Any) -> str:
    return str(getattr(templates().get_template("parts.html.j2").module, macro)(*values)).strip()


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 4 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def settings_text(values: Mapping[str, Any]) -> str:
    """Settings as YAML, or nothing for none."""
    if not values:
        return ""
    return yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False, allow_unicode=True)


def model_label(name: str) -> str:
    """A short name of a model that still tells it from others: a hub id, or the last two folders of a path.

    Most checkpoints of a run lie in a folder called `model`, so the last one alone says nothing.
    """
    parts = [part for part in Path(name).parts if part not in ("/", "..", ".")]
    return "/".join(parts[-2:]) or name
