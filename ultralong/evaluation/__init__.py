"""A model measured: tests and their samples, measures with intervals, runs that resume, and their reports."""
