"""Exercises of notebooks 00 to 04: the recipe, positions, rows and where their documents come from."""
