"""Packed rows to look at in a notebook: a slider over the rows for a live reader, a table for everyone else."""

from __future__ import annotations

from collections.abc import Callable

from ultralong.utils.extras import require


def browse_rows(
    count: int,
    html_of: Callable[[int], str],
    text_of: Callable[[int], str],
    *,
    interactive: bool = False,
    first: int = 0,
) -> None:
    """Show one row as a table and, for a live reader, a slider that goes through all of them.

    The table comes as one bundle of HTML and plain text: a page that strips HTML still has the text, and so has a
    terminal. It stays in a saved notebook; the slider lives only as long as its kernel.

    Args:
        count: How many rows there are.
        html_of: From a row's number to HTML, such as `as_html(inspect_row(...))`.
        text_of: From a row's number to plain text, such as `as_text(inspect_row(...))`.
        interactive: True adds the slider (needs ipywidgets and a running kernel).
        first: The row of the table.

    Raises:
        ValueError: There is no such row.
    """
    if not 0 <= first < count:
        raise ValueError(f"there is no row {first}: there are {count}.")
    ipython = require("IPython", extra="notebooks")
    if ipython.get_ipython() is None:
        print(text_of(first))
        return
    ipython.display.display({"text/html": html_of(first), "text/plain": text_of(first)}, raw=True)
    if interactive:
        ipython.display.display(row_browser(count, html_of, first))


def row_browser(count: int, html_of: Callable[[int], str], first: int = 0) -> object:
    """The widget itself: a slider above the row it points at.

    Args:
        count: How many rows there are.
        html_of: From a row's number to HTML.
        first: The row it starts with.

    Returns:
        An ipywidgets box; `box.children` are the slider and the table.
    """
    widgets = require("ipywidgets", extra="notebooks")
    slider = widgets.IntSlider(value=first, min=0, max=count - 1, description="row", continuous_update=False)
    table = widgets.HTML(html_of(first))

    def turn(change: dict[str, int]) -> None:
        table.value = html_of(change["new"])

    slider.observe(turn, names="value")
    return widgets.VBox([slider, table])
