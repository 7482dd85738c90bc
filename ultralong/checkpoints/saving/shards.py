"""Shards of a checkpoint: several files at a time, each hashed as it is written, in the format of torch's own writer.

torch's writer, as it is by default, waits at every large tensor for all the work that the training has given to the GPU
so far (`_OverlappingCpuLoader` synchronises the stream), also where the tensors lie on the host already. Here no thread
that writes asks a GPU for anything but tensors that lie there, of which a copy for the background has none.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

# A file's thread hashes a piece and then writes it, so that hashing is a third of its time or less: four of them keep
# one disk busy and leave the cores of a host with eight GPUs to the others.
MOST_FILES = 4
SMALLEST_FILE = 1 << 26  # bytes that are worth a file of their own
# Bytes at a time. A thread holds Python's lock only between pieces, a few hundred times a second at most, so that the
# thread that starts the GPU's kernels has it when it asks.
PIECE = 1 << 24
# Bytes of a file that may wait for the disk. Left to the system, they would be a tenth of the host's memory and more,
# and the disk would do nothing until then.
UNSYNCED = 1 << 28


@dataclass
class WrittenFile:
    """A file that was written, and where its thread's time went.

    Attributes:
        bytes: Its size.
        sha256: Of its content, as lower-case hex.
        seconds: From its first byte until it was on the disk.
        hash_seconds: Of these, hashing.
        write_seconds: Handing the bytes to the system, which copies them.
        sync_seconds: Waiting for the disk. What is left is torch's archive: its checksum, and copies from a GPU.
    """

    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    hash_seconds: float = 0.0
    write_seconds: float = 0.0
    sync_seconds: float = 0.0


class HashedStream:
    """A file to be written from its start to its end, which takes its hash of what it is given.

    Args:
        path: A new file.
    """

    def __init__(self, path: Path) -> None:
        self.facts, self._begin = WrittenFile(), time.perf_counter()
        self._sha256, self._unsynced = hashlib.sha256(), 0
        # Small pieces, of which an archive has dozens, are gathered; a large one goes to the system as it is.
        self._file = io.BufferedWriter(io.FileIO(path, "w"), 1 << 20)

    def write(self, data: Any) -> int:
        """Write bytes, or what holds bytes.

        Raises:
            OSError: The disk is full, or not writable.
        """
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            piece, begin = view[start : start + PIECE], time.perf_counter()
            self._sha256.update(piece)
            hashed = time.perf_counter()
            self._file.write(piece)
            self.facts.hash_seconds += hashed - begin
            self.facts.write_seconds += time.perf_counter() - hashed
            self._unsynced += len(piece)
            if self._unsynced >= UNSYNCED:
                self._sync()
        self.facts.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: what is written goes to the disk in pieces of its own size. torch asks after each tensor."""

    def tell(self) -> int:
        """Bytes so far."""
        return self.facts.bytes

    def close(self) -> WrittenFile:
        """The file's facts, when it is on the disk."""
        with self._file:
            self._sync()
        self.facts.sha256 = self._sha256.hexdigest()
        self.facts.seconds = time.perf_counter() - self._begin
        return self.facts

    def abandon(self) -> None:
        """Close a file that could not be written to its end."""
        self._file.raw.close()

    def _sync(self) -> None:
        begin = time.perf_counter()
        self._file.flush()
        os.fsync(self._file.fileno())
        if sys.platform == "linux":
            # They are on the disk; kept in memory, they would push out the rows and weights that others read.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.facts.sync_seconds += time.perf_counter() - begin
        self._unsynced = 0


class ShardWriter(FileSystemWriter):
    """torch's writer of a checkpoint folder, but for the writing: a process's share goes into several files at a time.

    Attributes:
        files: What this process has written, by file name; without the metadata.
        began: When its first byte was to be written, as `time.perf_counter` counts; the plan was made before.
    """

    def __init__(self, folder: Path) -> None:
        """Write into an empty folder, the same for all processes."""
        super().__init__(folder)
        self.files: dict[str, WrittenFile] = {}
        self.began = 0.0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's items.

        Raises:
            OSError: A file could not be written; the first such error of any of them.
        """
        self.began = time.perf_counter()
        parts = share_out(plan.items)
        names = [f"{cast(Any, plan.storage_data).prefix}{number}.distcp" for number in range(len(parts))]
        with ThreadPoolExecutor(max(1, len(parts)), thread_name_prefix="shard") as threads:
            written = list(threads.map(lambda name, items: self._write_file(name, items, planner), names, parts))
        results: Future[list[WriteResult]] = Future()
        results.set_result([result for part in written for result in part])
        return results

    def _write_file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        stream, results = HashedStream(Path(self.path) / name), []
        try:
            for item in items:
                start = stream.tell()
                _write_item(stream, planner.resolve_data(item), item)
                size = stream.tell() - start
                results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
            self.files[name] = stream.close()
        except BaseException:
            stream.abandon()
            raise
        return results


def _write_item(stream: HashedStream, data: Any, item: WriteItem) -> None:
    """Append one entry as torch's writer does: an archive of its own for each tensor."""
    if item.type == WriteItemType.BYTE_IO:
        stream.write(data.getbuffer())
        return
    tensor = data.detach().cpu()
    if tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()  # an archive holds the whole of a storage, of which this is a part
    torch.save(tensor, cast(IO[bytes], stream))


def share_out(items: Sequence[WriteItem], most: int | None = None) -> list[list[WriteItem]]:
    """Items of one process by the file they go to: files of about one size, large tensors before small ones.

    Args:
        items: What is to be written.
        most: Files at most; None: `MOST_FILES`, and no more than the process has cores.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    most = min(MOST_FILES, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) if most is None else most
    sized = [(_bytes(item), item) for item in items]
    count = max(1, min(most, sum(size for size, _ in sized) // SMALLEST_FILE)) if items else 0
    files: list[list[WriteItem]] = [[] for _ in range(count)]
    filled = [0] * count
    for size, item in sorted(sized, key=lambda each: (each[1].tensor_data is not None, -each[0])):
        least = filled.index(min(filled))
        files[least].append(item)
        filled[least] += size
    return files


def _bytes(item: WriteItem) -> int:
    """Of a tensor's share; an entry that is no tensor is a number or a few words."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
