"""Fixtures of the tests of evaluation: pages with small pictures."""

from __future__ import annotations

import pytest

from ultralong import figures


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn all the same, on a sixteenth of the pixels: to compress them takes most of a page's time."""
    drawn = figures.png_bytes
    monkeypatch.setattr(figures, "png_bytes", lambda figure, scale, **size: drawn(figure, scale=scale / 4, **size))
