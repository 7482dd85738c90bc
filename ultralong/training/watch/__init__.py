"""Watching the ranks of a run: which one is slow, which one hangs, and numbers for trackers."""
