"""Arrays in files, read piece by piece: a file that is cut while it is read is an error that names it.

A memory map would end the process by a signal (SIGBUS), without a word, where a disk or another host takes a part of
the file away. What is deleted or renamed meanwhile is read to its end, as the file stays open.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class StoredArray:
    """A one- or two-dimensional array in a file, as numpy arrays of the rows that are asked for.

    Args:
        path: A `.npy` file; or one of numbers alone, where `dtype` is given.
        dtype: Their type.

    Raises:
        ValueError: The file is no such array.
    """

    def __init__(self, path: Path, dtype: np.dtype | None = None) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this object
        if dtype is not None:
            self.shape: tuple[int, ...] = (os.fstat(self._file.fileno()).st_size // dtype.itemsize,)
            self.dtype, self._start = dtype, 0
        else:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            version = np.lib.format.read_magic(self._file)
            self.shape, across, self.dtype = read[version](self._file)
            if across or self.dtype.hasobject or len(self.shape) not in (1, 2):
                raise ValueError(f"{path} holds no plain array of numbers.")
            self._start = self._file.tell()
        self._size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))  # bytes of a row

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: int | slice) -> np.ndarray:
        first, last, _ = (
            slice(place, place + 1).indices(len(self)) if isinstance(place, int) else place.indices(len(self))
        )
        found = self.read(first, max(first, last))
        return found[0] if isinstance(place, int) else found

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` - 1.

        Raises:
            ValueError: The file is shorter than it was.
        """
        content = bytearray((last - first) * self._size)
        view, place = memoryview(content), self._start + first * self._size
        while view:
            got = os.preadv(self._file.fileno(), [view], place)
            if not got:
                raise ValueError(f"{self.path} was cut while it was read. Run the command that made it again.")
            view, place = view[got:], place + got
        return np.frombuffer(content, self.dtype).reshape(last - first, *self.shape[1:])

    def first_at_least(self, value: int) -> int:
        """The first row whose (first) number is `value` or more, of rows in ascending order; few of them are read."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            number = self.read(middle, middle + 1).flat[0]
            low, high = (middle + 1, high) if number < value else (low, middle)
        return low
