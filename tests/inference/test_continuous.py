"""Short requests that are answered together: each as it would be alone, whatever comes, ends or leaves meanwhile."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from ultralong import miniature
from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.decoding import Sampling, collect
from ultralong.inference.engines import LocalEngine, as_text
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.tickets import Job, Ticket
from ultralong.inference.server.worker import Worker

ROOM = 48  # tokens of a short prompt and its answer


@pytest.fixture(scope="module")
def engine():
    return LocalEngine(*load_model_and_tokenizer(miniature.path(), "cpu"), chunk=64)


@pytest.fixture(scope="module")
def ids(engine):
    return engine.tokenizer("The number of harbour-lane is 48213. The ship came in at noon with the tide. " * 4)[
        "input_ids"
    ]


def alone(engine, job: Job) -> tuple[str, str]:
    engine.interrupted = lambda: False  # a worker that has stopped leaves its own
    steps = engine.stream(job.prompt, job.max_new_tokens, sampling=job.sampling)
    (found,) = collect(steps, 1)
    return as_text(engine.tokenizer, found.tokens), found.finish_reason


def answered(engine, jobs, batch, prepare=lambda tickets: None) -> tuple[list, Metrics]:
    """What a worker says that finds all jobs waiting; for each its text and why it ended, or its error."""

    async def ask():
        metrics = Metrics()
        worker = Worker(engine, 4096, 100, metrics, batch)
        tickets = [Ticket(job, asyncio.get_running_loop()) for job in jobs]
        for ticket in tickets:
            worker._queue.put_nowait(ticket)  # as `submit` does, before the thread looks
        prepare(tickets)
        worker.start()
        found = [await whole(ticket) for ticket in tickets]
        await asyncio.to_thread(worker.stop)
        return found, metrics

    async def whole(ticket):
        text = ""
        while not ticket.cancelled.is_set():
            try:
                piece = await asyncio.wait_for(ticket.pieces.get(), 1)
            except TimeoutError:
                continue
            if piece.error is not None:
                return piece.error.code
            text += piece.text
            if piece.finish_reason:
                return text, piece.finish_reason
        return "cancelled"

    return asyncio.run(ask())


def test_each_answer_is_that_of_the_request_alone(engine, ids, monkeypatch):
    """More requests than rows, of unequal lengths, greedy and sampled, a long one between them."""
    jobs = [Job(tuple(ids[start : start + 7 + start]), 5 + start % 9, Sampling()) for start in range(12)]
    jobs += [Job(tuple(ids[:9]), 12, Sampling(0.8, 0.9, seed), ("e",) if seed % 2 else ()) for seed in range(3)]
    jobs.insert(7, Job(tuple(ids), 12, Sampling()))
    batch = ContinuousBatch(engine.model, 3, ROOM)
    together, step = [], ContinuousBatch.step

    def counted(self, tokens):
        together.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", counted)
    found, metrics = answered(engine, jobs, batch)
    for job, (text, reason) in zip(jobs, found, strict=True):
        wanted, why = alone(engine, job)
        if job.stop and "e" in wanted:
            wanted, why = wanted.partition("e")[0], "stop"
        assert (text, reason) == (wanted, why)
    assert max(together) == 3
    # Rows that end are taken by requests that wait: as few steps as that needs.
    assert len(together) < sum(together) / 1.8
    assert batch.free == [0, 1, 2]
    page = metrics.page().decode()
    assert f"ultralong_prompt_tokens_total {float(sum(len(job.prompt) for job in jobs))}" in page


def test_a_cancelled_request_makes_room_and_the_others_go_on(engine, ids, monkeypatch):
    jobs = [Job(tuple(ids[start : start + 9]), 20, Sampling()) for start in range(5)]
    step, kept = ContinuousBatch.step, []

    def prepare(tickets):
        tickets[3].cancelled.set()  # while it waits
        kept.extend(tickets)

    def leaves(self, tokens):
        kept[0].cancelled.set()
        return step(self, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", leaves)
    batch = ContinuousBatch(engine.model, 2, ROOM)
    found, metrics = answered(engine, jobs, batch, prepare)
    assert (found[0], found[3]) == ("cancelled", "cancelled")
    assert [found[at] for at in (1, 2, 4)] == [alone(engine, jobs[at]) for at in (1, 2, 4)]
    assert 'outcome="cancelled",route="completions"} 2.0' in metrics.page().decode()
    assert batch.free == [0, 1]


def test_a_row_without_numbers_is_told_and_the_others_go_on(engine, ids, monkeypatch):
    """Its largest score would be an answer like any other, and a draw from it an error for the whole batch."""
    jobs = [Job(tuple(ids[start : start + 9]), 6, Sampling(float(start == 1), seed=1)) for start in range(3)]
    step = ContinuousBatch.step

    def breaks(self, tokens):
        return {row: scores * (math.nan if row == 1 else 1) for row, scores in step(self, tokens).items()}

    monkeypatch.setattr(ContinuousBatch, "step", breaks)
    batch = ContinuousBatch(engine.model, 3, ROOM)
    found, _ = answered(engine, jobs, batch)
    assert found == [alone(engine, jobs[0]), "server_error", alone(engine, jobs[2])]
    assert batch.free == [0, 1, 2]


@pytest.mark.parametrize(("kind", "code"), [(RuntimeError, "server_error"), (torch.OutOfMemoryError, "out_of_memory")])
def test_a_batch_that_fails_is_told_and_the_next_one_is_answered(engine, ids, monkeypatch, kind, code):
    jobs = [Job(tuple(ids[start : start + 9]), 6, Sampling()) for start in range(4)]
    step, calls = ContinuousBatch.step, []

    def fails(self, tokens):
        calls.append(tokens)
        if len(calls) == 2:
            raise kind("for a test")
        return step(self, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", fails)
    found, _ = answered(engine, jobs, ContinuousBatch(engine.model, 2, ROOM))
    assert found[:2] == [code, code]
    assert found[2:] == [alone(engine, job) for job in jobs[2:]]


def test_short_requests_leave_what_a_long_one_has_read(engine, ids):
    """The prompt after them that begins as the long one before them is not read again."""
    long, short = Job(tuple(ids), 4, Sampling()), [Job(tuple(ids[3:12]), 4, Sampling())] * 2
    engine.release()
    answered(engine, [long, *short], ContinuousBatch(engine.model, 2, ROOM))
    alone(engine, Job((*ids, ids[0]), 2, Sampling()))
    assert engine.reused >= len(ids) - 1


def test_a_model_whose_frequencies_follow_the_length_is_refused(engine, monkeypatch):
    monkeypatch.setattr("ultralong.inference.continuous.RopeTables.same", lambda *_: False)
    with pytest.raises(ValueError, match="RoPE follows the length"):
        ContinuousBatch(engine.model, 2, ROOM)
