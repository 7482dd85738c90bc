"""Short requests that are answered together: each as it would be alone, whatever comes, ends or leaves meanwhile."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from ultralong import miniature
from ultralong.inference import engines, sharded_generation
from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.decode_step import plain
from ultralong.inference.decode_step.step import DecodeStep
from ultralong.inference.decoding import Sampling, collect
from ultralong.inference.engines import LocalEngine, as_text
from ultralong.inference.load import load_model_and_tokenizer
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.tickets import Job, Ticket
from ultralong.inference.server.worker import Worker

ROOM = 48  # tokens of a short prompt and its answer


@pytest.fixture(scope="module", params=["own code", "fused step"])
def engine(request):
    """An engine by the model's own code, and one by the fused step, here by its operations in torch."""
    model, tokenizer = load_model_and_tokenizer(miniature.path(), "cpu")
    fused = request.param == "fused step"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "is_fast", lambda model: True)
        patch.setattr(
            sharded_generation, "fast_step", lambda model, cache, group, way: DecodeStep(model, cache, group, plain)
        )
        made = LocalEngine(model, tokenizer, chunk=64, fused=fused)
    yield made
    if fused:
        made.answer([[7, 8, 9]], [3])  # the tests of this process may have asked it for nothing
        assert made._runner.step.checked, "each step but the first was the fused one"


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


def answered(engine, jobs, batch, prepare=lambda tickets: None, later=None) -> tuple[list, Metrics]:
    """What a worker says that finds all jobs waiting; for each its text and why it ended, or its error.

    With `later` they wait behind the first one, which has so many tokens of its answer when they come.
    """

    async def ask():
        metrics = Metrics()
        worker = Worker(engine, 4096, 100, metrics, batch)
        tickets = [Ticket(job, asyncio.get_running_loop()) for job in jobs]

        def come(which):
            for ticket in which:
                worker._queue.put_nowait(ticket)  # as `submit` does, before the thread looks

        come(tickets if later is None else tickets[:1])
        if later is not None:
            put, said = tickets[0].put, []

            def counted(piece):
                put(piece)
                said.append(piece)
                if len(said) == later:
                    come(tickets[1:])

            tickets[0].put = counted
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


@pytest.fixture
def steps(monkeypatch):
    """Rows of each step of a batch."""
    found, step = [], ContinuousBatch.step

    def counted(self, tokens):
        found.append(sorted(tokens))
        return step(self, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", counted)
    return found


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, 3)], ids=["greedy", "sampled"])
def test_a_request_that_is_answered_alone_is_joined_by_those_that_come(engine, ids, steps, sampling):
    """They waited for its end. What it has read so far is neither read nor drawn again."""
    first = Job(tuple(ids[:17]), 30, sampling)
    jobs = [first, *(Job(tuple(ids[start : start + 9]), 6 + start, Sampling()) for start in range(3))]
    batch = ContinuousBatch(engine.model, 3, ROOM)
    engine.release()
    found, metrics = answered(engine, jobs, batch, later=5)
    assert (steps[0], steps[-1]) == ([0, 1, 2], [0])
    assert len(steps) == 30 - 5, "the engine has decoded five tokens"
    assert batch.free == [0, 1, 2]
    page = metrics.page().decode()
    assert f"ultralong_prompt_tokens_total {float(sum(len(job.prompt) for job in jobs))}" in page
    assert f"ultralong_new_tokens_total {30 + 6 + 7 + 8.0}" in page
    assert 'ultralong_requests_total{outcome="length",route="completions"} 4.0' in page
    assert "ultralong_running_requests 0.0" in page
    assert found == [alone(engine, job) for job in jobs]


def test_what_the_batch_has_read_of_an_answer_is_kept_for_the_next_turn(engine, ids, steps):
    first = Job(tuple(ids[:17]), 30, Sampling())
    engine.release()
    answered(engine, [first, Job(tuple(ids[:9]), 6, Sampling())], ContinuousBatch(engine.model, 3, ROOM), later=5)
    assert steps
    other = LocalEngine(engine.model, engine.tokenizer)
    (answer,) = collect(other.stream(first.prompt, 30), 1)
    turn = Job((*first.prompt, *answer.tokens, ids[0], ids[1]), 4, Sampling())
    assert alone(engine, turn) == alone(other, turn)
    assert engine.reused == 17 + 29, "all but the last token, which nobody has read"


@pytest.mark.parametrize("later", [1, 29])
def test_a_request_may_be_joined_at_its_first_token_and_just_before_its_last(engine, ids, steps, later):
    jobs = [Job(tuple(ids[:17]), 30, Sampling()), Job(tuple(ids[3:9]), 4, Sampling())]
    found, _ = answered(engine, jobs, ContinuousBatch(engine.model, 2, ROOM), later=later)
    assert steps[0] == [0, 1]
    assert found == [alone(engine, job) for job in jobs]


def test_a_long_request_is_not_joined_and_a_short_one_not_by_a_long_one(engine, ids, steps):
    long, short = Job(tuple(ids), 12, Sampling()), Job(tuple(ids[:9]), 12, Sampling())
    batch = ContinuousBatch(engine.model, 3, ROOM)
    for jobs in ([long, short], [short, long]):
        found, _ = answered(engine, jobs, batch, later=3)
        assert found == [alone(engine, job) for job in jobs]
    assert not steps


def test_a_joined_request_can_be_left_and_the_others_go_on(engine, ids, monkeypatch):
    jobs, kept = [Job(tuple(ids[start : start + 9]), 20, Sampling()) for start in range(3)], []
    step = ContinuousBatch.step

    def leaves(self, tokens):
        kept[0].cancelled.set()
        return step(self, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", leaves)
    batch = ContinuousBatch(engine.model, 3, ROOM)
    found, metrics = answered(engine, jobs, batch, kept.extend, later=4)
    assert found[1:] == [alone(engine, job) for job in jobs[1:]]
    assert 'outcome="cancelled",route="completions"} 1.0' in metrics.page().decode()
    assert batch.free == [0, 1, 2]


@pytest.mark.parametrize(("kind", "code"), [(RuntimeError, "server_error"), (torch.OutOfMemoryError, "out_of_memory")])
def test_a_request_that_can_not_be_handed_over_is_told_and_the_next_is_answered(engine, ids, monkeypatch, kind, code):
    def fails(self, row, store):
        raise kind("for a test")

    monkeypatch.setattr(ContinuousBatch, "adopt", fails)
    jobs = [Job(tuple(ids[start : start + 9]), 12, Sampling()) for start in range(2)]
    found, metrics = answered(engine, jobs, ContinuousBatch(engine.model, 3, ROOM), later=3)
    assert found == [code, alone(engine, jobs[1])]
    assert 'outcome="error",route="completions"} 1.0' in metrics.page().decode()


def test_a_model_whose_frequencies_follow_the_length_is_refused(engine, monkeypatch):
    monkeypatch.setattr("ultralong.inference.continuous.RopeTables.same", lambda *_: False)
    with pytest.raises(ValueError, match="RoPE follows the length"):
        ContinuousBatch(engine.model, 2, ROOM)
