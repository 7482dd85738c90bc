"""Checkpoint folders: extended to a longer window, described by a model card, copied whole."""
