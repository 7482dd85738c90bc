"""Archives made of names and contents."""

from __future__ import annotations

import io
import tarfile


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar.gz with these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
