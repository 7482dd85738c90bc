"""`ultralong` and `python` for scripts that start them again and again, from a process in which everything is imported.

`served(folder)` puts programs of these names into a folder. Each hands its words, folder, environment and streams to a
server, which forks a process for them; the program ends with that one's exit code, passes on what signals ask of it,
and takes it along when it is killed. The imports' seconds are saved.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import forked

from ultralong import cli
from ultralong.utils.processes import end_with_parent

PROGRAM = """#!{python} -SEs
import ctypes, json, os, signal, socket, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with what started it, as its process does then
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(asked)
    answers = server.makefile()  # the process's id, then its exit code
    child = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """While this is open, `folder/ultralong` is the command and `folder/python` an interpreter of modules and `-c`."""
    programs = [folder / name for name in ("ultralong", "python")]
    # A socket's path has a hundred characters at most, which those of pytest's folders may exceed.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(short, "socket"))
        listener.bind(address)
        listener.listen()
        for program in programs:
            program.write_text(PROGRAM.format(python=sys.executable, address=address, name=program.name))
            program.chmod(0o755)
        server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener, programs[1]), daemon=True)
        server.start()
        try:
            yield
        finally:
            server.terminate()
            server.join()
            for program in programs:
                program.unlink()


def _serve(listener: socket.socket, interpreter: Path) -> None:
    running: dict[int, socket.socket] = {}  # process id of what was asked for, and the program that asked
    while True:
        ready, _, _ = select.select([listener, *running.values()], [], [], 0.02)
        for pid, client in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _tell(running.pop(pid), os.waitstatus_to_exitcode(status))
                client.close()
            elif client in ready:  # it says nothing more: it was killed
                os.kill(pid, signal.SIGKILL)
        if listener in ready:
            client, _ = listener.accept()
            size, streams, _, _ = socket.recv_fds(client, 8, 3)
            with client.makefile("rb") as asked:
                name, words, cwd, environment = json.loads(asked.read(int.from_bytes(size, "little")))
            pid = os.fork()
            if not pid:
                end_with_parent(how=signal.SIGKILL)
                for sock in (listener, client, *running.values()):
                    sock.close()
                environment["PYTHON_EXEC"] = str(interpreter)  # what torchrun starts its ranks with
                work = cli.main if name == "ultralong" else _interpret
                forked.run_and_exit(partial(work, words), Path(cwd), environment, streams)
            for stream in streams:
                os.close(stream)
            running[pid] = client
            _tell(client, pid)


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # a program that was killed
        client.sendall(f"{number}\n".encode())


def _interpret(words: list[str]) -> None:
    """What an interpreter does with `-m MODULE WORDS` or `-c CODE`."""
    while words[0] in ("-u", "-P"):
        words = words[1:]
    option, given, *rest = words
    if option == "-c":
        sys.argv = ["-c", *rest]
        exec(compile(given, "<string>", "exec"), {"__name__": "__main__"})
    else:
        assert option == "-m"
        sys.argv = [given, *rest]
        runpy.run_module(given, run_name="__main__", alter_sys=True)
