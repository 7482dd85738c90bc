"""A shuffle that needs no memory: a keyed permutation of 0..n-1 whose i-th place is computed, not stored.

Shuffling documents with `numpy.random.permutation` costs 8 bytes a document and a pass before the first row. A small
Feistel network (Luby and Rackoff 1988) is a bijection on pairs of half-words whatever its round function is; walking
on until the value falls below n (Black and Rogaway 2002, "cycle walking") makes it a bijection on 0..n-1. Any place can
be asked for at any time, which is what lets packing resume in the middle at no cost.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6


def permuted(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where `index` lands under the pseudo-random permutation of range(`size`) that `seed` names.

    Args:
        index: Integers in 0..size-1, any shape.
        size: How many items are permuted.
        seed: Names the permutation; any integer.

    Returns:
        int64 array of `index`'s shape. Over all of range(size) every number occurs exactly once.

    Raises:
        ValueError: An index lies outside range(size).
    """
    flat = np.asarray(index, dtype=np.int64).ravel()
    if flat.size and (flat.min() < 0 or flat.max() >= size):
        raise ValueError(f"indices must lie in 0..{size - 1}, found {flat.min()}..{flat.max()}.")
    # An even number of bits, so that both halves are equally wide; at most 4 * size values, hence under 4 walks each.
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _mixed(np.arange(1, ROUNDS + 1, dtype=np.uint64) + _mixed(np.array([seed % 2**64], dtype=np.uint64)))
    value = flat.astype(np.uint64)
    outside = np.ones(flat.shape, dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], keys, half)
        outside = value >= np.uint64(size)
    return value.astype(np.int64).reshape(np.shape(index))


def _feistel(value: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """One pass of the network over values of 2 * `half` bits."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << shift) | right


def _mixed(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit; wraps mod 2^64."""
    value = (value + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
