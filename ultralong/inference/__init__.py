"""Prefill and decoding at length, on one GPU or several."""
