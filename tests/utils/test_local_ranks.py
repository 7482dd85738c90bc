"""Ranks that are killed where it hurts most, and ports that nobody else may take meanwhile."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from ultralong.cli.errors import mendable
from ultralong.utils.local_ranks import GRACE, RankFailed, RankKilled, held_port, run_ranks

LARGE = 1 << 22  # bytes of an answer that a pipe does not hold


def killed_within_its_answer(rank, world):
    if rank == 1:
        write = os.write

        def half(stream, data):
            write(stream, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        os.write = half
    return bytes(LARGE)


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_is_killed_within_its_answer_keeps_nobody_waiting(world):
    begun = time.monotonic()
    with pytest.raises(RankKilled, match=rf"^rank 1 of {world} was killed \(process \d+, SIGKILL\)[^\n]*$") as caught:
        run_ranks(killed_within_its_answer, world, timeout=100)
    assert time.monotonic() - begun < 60
    assert mendable(caught.value), "a command says it in one line"
    assert "--- rank 1 ---\nprocess ended with exit code -9 and no result" in str(caught.value.__cause__)


def stopped(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rank


def test_a_rank_that_is_stopped_is_ended_and_named_at_the_deadline():
    with pytest.raises(RankFailed, match=r"1 of 2 ranks failed:\n--- rank 1 ---\ndid not finish in time"):
        run_ranks(stopped, 2, timeout=1)


def fails_first(rank, world):
    if rank == 0:
        raise ValueError("the first has failed")
    time.sleep(100)


def test_ranks_that_leave_signals_to_the_first_are_ended_together():
    """Each is killed where it has not ended by SIGTERM in a moment: the moment is the same for all."""
    begun = time.monotonic()
    with pytest.raises(RankFailed, match="the first has failed"):
        run_ranks(fails_first, 6, timeout=100, first_stops=True)
    assert time.monotonic() - begun < 3.5 * GRACE, "one for what others report, one to end"


def large(rank, world):
    return bytes([rank]) * LARGE


def test_large_answers_arrive_whole_and_in_order():
    assert run_ranks(large, 3) == [bytes([rank]) * LARGE for rank in range(3)]


def test_a_held_port_is_torchs_to_listen_on_and_nobody_elses():
    with held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        for _ in range(2):  # as by a host that is lost and comes back
            server = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=10))
            server.set("key", "value")
            client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
            assert client.get("key") == b"value"
            del client, server
