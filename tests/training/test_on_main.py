"""What only the main process does: where it fails, the other processes end with the same error, and at once."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from forked import train_over
from tiny_run import make_run

from ultralong.training import loop
from ultralong.training.config import ParallelConfig
from ultralong.training.parallel import on_main
from ultralong.utils.local_ranks import RankFailed, run_ranks


class Demanding(Exception):
    """Can't be unpickled: it wants two arguments and keeps one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Unsendable:
    def __reduce__(self):
        raise TypeError("stays here")


@dataclass(frozen=True)
class Answer:
    """What the main process finds, in the place of an error."""

    value: object


def raised_by_broken_json():
    json.loads("{")


ERRORS = {
    "a refusal": (ValueError("rows: not there."), ValueError, "rows: not there."),
    "an empty refusal": (ValueError(), ValueError, ""),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "run"), OSError, "[Errno 28]"),
    "no rights": (OSError(errno.EACCES, "Permission denied", "run"), PermissionError, "[Errno 13]"),
    "a slip of ours": (KeyError("step"), KeyError, "'step'"),
    "a type of its own": (raised_by_broken_json, json.JSONDecodeError, "Expecting property name"),
    "one that can't be sent": (Demanding("bad", "news"), RuntimeError, "Demanding: bad news"),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, ""),
    "a way out": (SystemExit(143), SystemExit, "143"),
    "an answer that can't be sent": (Answer(Unsendable()), TypeError, "stays here"),
}


def met(rank: int, world: int, failure) -> tuple[type, str, list[str], float]:
    def work():
        if isinstance(failure, Answer):
            return failure.value
        if callable(failure):
            failure()
        raise failure

    begin = time.monotonic()
    try:
        on_main(work, SimpleNamespace(is_main_process=rank == 0, num_processes=world))
    except BaseException as error:  # noqa: BLE001 - what the test is about
        return type(error), str(error), getattr(error, "__notes__", []), time.monotonic() - begin


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_the_main_process_reaches_all(kind):
    failure, wanted, words = ERRORS[kind]
    for rank, (found, said, notes, seconds) in enumerate(run_ranks(met, 2, failure, timeout=30)):
        assert found is wanted
        assert said.startswith(words)
        assert notes == ["Raised by the main process, rank 0."] * (rank > 0)
        assert seconds < 10
    if isinstance(failure, OSError):
        assert "run" in said


def answers(rank: int, world: int) -> list[object]:
    accelerator = SimpleNamespace(is_main_process=rank == 0, num_processes=world)
    work = iter((7, None)) if rank == 0 else iter(())  # the other process may not ask
    return [on_main(lambda: next(work), accelerator) for _ in range(2)]


def test_what_the_main_process_finds_reaches_all():
    assert run_ranks(answers, 2, timeout=30) == [[7, None], [7, None]]


def test_one_process_raises_what_it_met():
    failure = Demanding("bad", "news")

    def work():
        raise failure

    with pytest.raises(Demanding) as caught:
        on_main(work, SimpleNamespace(is_main_process=True, num_processes=1))
    assert caught.value is failure


def test_a_model_that_cannot_be_written_ends_all_processes(tmp_path, make_tiny_model, tiny_tokenizer, monkeypatch):
    """The others waited at a barrier until torchrun killed them."""
    monkeypatch.chdir(tmp_path)
    two = ParallelConfig(context_parallel_size=2)
    config = make_run(tmp_path, make_tiny_model(), tiny_tokenizer, steps=1, parallel=two)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    def recorded(*arguments: object) -> None:
        place = arguments[2].accelerator.process_index
        try:
            real(*arguments)
        except OSError as error:
            (tmp_path / f"met-{place}").write_text(str(error))
            time.sleep(2)  # until the other one has said it as well
            raise

    real = loop._train_in
    monkeypatch.setattr(loop, "export", full)
    monkeypatch.setattr(loop, "_train_in", recorded)
    with pytest.raises(RankFailed, match="No space left on device; free some space"):
        train_over(config, 2)
    assert (tmp_path / "met-0").read_text() == (tmp_path / "met-1").read_text()
