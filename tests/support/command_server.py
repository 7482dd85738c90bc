"""`ultralong` for scripts that call it again and again, from a process in which everything is imported.

`served(folder)` puts a program `ultralong` into a folder. It hands its words, folder, environment and streams to a
server, which forks a process for them, and ends with that one's exit code: the imports' seconds are saved.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forked

PROGRAM = """#!{python} -SEs
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.makefile().read()))
"""


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """While this is open, `folder/ultralong` is the command."""
    program = folder / "ultralong"
    # A socket's path has a hundred characters at most, which those of pytest's folders may exceed.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(short, "socket"))
        listener.bind(address)
        listener.listen()
        program.write_text(PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
        server.start()
        try:
            yield
        finally:
            server.terminate()
            server.join()
            program.unlink()


def _serve(listener: socket.socket) -> None:
    while True:
        client, _ = listener.accept()
        with client:
            size, streams, _, _ = socket.recv_fds(client, 8, 3)
            words, cwd, environment = json.loads(client.makefile("rb").read(int.from_bytes(size, "little")))
            child = os.fork()
            if not child:
                forked.run_and_exit(words, Path(cwd), environment, streams)
            _, status = os.waitpid(child, 0)
            for stream in streams:
                os.close(stream)
            client.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
