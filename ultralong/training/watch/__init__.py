"""Watching the ranks of a run: which is slow, which hangs, numbers for trackers, the full disk behind an error."""
