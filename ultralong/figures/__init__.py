"""Plotly figures with a still picture beside them, and sliders that have a still version. Nothing is computed here."""

from ultralong.figures.data import attention_mask, length_buckets, packed_row, shares, token_table
from ultralong.figures.evaluation import needle_before_after, needle_heatmap, perplexity_curve, score_curves
from ultralong.figures.panels import side_by_side
from ultralong.figures.rope import circle_seen, clock_hands, lines, speed_kept, wavelengths
from ultralong.figures.rows import browse_rows, row_browser
from ultralong.figures.show import explore, png_bytes, save_png, show
from ultralong.figures.theme import PALETTE, new_figure, style, tokens_label
from ultralong.figures.training import loss_curve

__all__ = [
    "PALETTE",
    "attention_mask",
    "browse_rows",
    "circle_seen",
    "clock_hands",
    "explore",
    "length_buckets",
    "lines",
    "loss_curve",
    "needle_before_after",
    "needle_heatmap",
    "new_figure",
    "packed_row",
    "perplexity_curve",
    "png_bytes",
    "row_browser",
    "save_png",
    "score_curves",
    "shares",
    "show",
    "side_by_side",
    "speed_kept",
    "style",
    "token_table",
    "tokens_label",
    "wavelengths",
]
