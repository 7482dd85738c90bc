"""Separator packing: documents joined into rows of exactly T tokens."""
