"""Exercises of notebooks 09 to 13: tuning, evaluation, ablations, many hosts and serving."""
