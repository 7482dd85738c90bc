"""Have a stronger model improve the answers of conversations, as the recipe's authors did with GPT-4o and GPT-4o-mini.

Any endpoint with OpenAI's protocol will do. The original of every conversation stays beside its refinement; a run that
is stopped or killed resumes where it stopped; a budget in tokens or money is never exceeded, because what a request may
cost at most is set aside before it is made. Only what was under way when a run was killed is on nobody's bill: at most
`concurrency` requests a kill.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ultralong.data.chat.budget import Budget
from ultralong.data.chat.endpoint import Client, Endpoint, RequestFailed, RequestStopped
from ultralong.data.read.conversations import Conversation
from ultralong.data.read.messages import REASONING, Message
from ultralong.utils.files import (
    append_jsonl,
    atomic_path,
    locked,
    read_json,
    read_jsonl,
    write_json,
)
from ultralong.utils.progress import progress

INSTRUCTION = (
    "You improve answers for the training of an assistant. You are given a conversation and a draft of the assistant's "
    "next answer. Write the answer that should have been given: correct, complete, clear, in the language of the "
    "question and in the form it asks for. Keep what is right in the draft, correct what is wrong, leave out what does "
    "not help. Reply with the answer alone, without any remark about the draft."
)
SERVERS_OWN = 4096  # tokens that a server may add to a prompt or an answer, such as a system message of its own
OVERHEAD = 16  # tokens of a message besides its text, at most: role, marks, line ends


@dataclass(frozen=True)
class RefineSettings:
    """What is asked, of whom, and for how much.

    Attributes:
        endpoint: Whom.
        instruction: The system message of every request.
        turns: last refines a conversation's last answer, all each in turn, with the refined ones before it.
        concurrency: Requests under way at once.
        budget_tokens: Tokens of prompts and answers together that may be used over all runs; by default no limit.
        budget_money: Money that may be spent over all runs; needs the two prices.
        prompt_price: Money for a million tokens of prompt.
        answer_price: Money for a million tokens of answer.
    """

    endpoint: Endpoint
    instruction: str = INSTRUCTION
    turns: Literal["last", "all"] = "last"
    concurrency: int = 8
    budget_tokens: int | None = None
    budget_money: float | None = None
    prompt_price: float = 0.0
    answer_price: float = 0.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, found {self.concurrency}.")
        if self.budget_money is not None and self.prompt_price <= 0 and self.answer_price <= 0:
            raise ValueError("budget_money needs prompt_price and answer_price: money for a million tokens.")

    def decides(self) -> dict[str, Any]:
        """What the refinements depend on, and what a folder is not continued without."""
        endpoint = self.endpoint
        return {
            "url": endpoint.url,
            "model": endpoint.model,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
            "options": endpoint.options,
            "instruction": self.instruction,
            "turns": self.turns,
        }


@dataclass
class RefineReport:
    """What came of it; `to_dict()` is JSON."""

    refined: int = 0
    failed: int = 0
    left: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    money: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        left = f", {self.left:,} left for the budget is used up" if self.left else ""
        why = "".join(f"\n  {count:,} failed: {reason}" for reason, count in sorted(self.reasons.items()))
        return (
            f"{self.refined:,} conversations refined, {self.failed:,} failed{left}; {self.retries:,} repetitions, "
            f"{self.prompt_tokens:,} + {self.answer_tokens:,} tokens, money {self.money:.4f}{why}"
        )


class _Exhausted(Exception):
    """The budget does not allow the next request."""


def refine(
    conversations: Iterable[Conversation], out: str | os.PathLike[str], settings: RefineSettings, *, quiet: bool = False
) -> RefineReport:
    """Refine conversations into `out/refined.jsonl`, going on where an earlier run stopped.

    A line holds id, source, licence, category, `messages` (refined; the original ones where it failed), `original`,
    `status` ("refined" or "failed"), tokens used, and for a failure its reason. Failures are tried again by the next
    run. The finished file is in the order of `conversations`. Recipes read it as any chat file, with `field: messages`.

    Args:
        conversations: Well-formed ones, with different ids.
        out: Folder to write.
        settings: What to ask, of whom, for how much.
        quiet: True shows no progress bar.

    Raises:
        ValueError: The folder was made with other settings or another refinement runs in it, or the key is missing.
    """
    out = Path(out)
    with locked(out):
        return _refine(conversations, out, settings, quiet)


def _refine(conversations: Iterable[Conversation], out: Path, settings: RefineSettings, quiet: bool) -> RefineReport:
    _check_folder(out, settings)
    log = out / "refined.jsonl"
    done = {record["id"]: record for record in read_jsonl(log)} if log.exists() else {}
    spent = [sum(record["usage"][key] for record in done.values()) for key in ("prompt_tokens", "answer_tokens")]
    budget = Budget(
        settings.budget_tokens,
        settings.budget_money,
        settings.prompt_price,
        settings.answer_price,
        spent=(spent[0], spent[1]),
    )
    stop, report = threading.Event(), RefineReport()

    def retried(reason: str) -> None:
        report.retries += 1

    worker = _Worker(Client(settings.endpoint, stop, retried), settings, budget)
    order: list[str] = []

    def waiting() -> Iterator[Conversation]:
        for talk in progress(conversations, desc="refine", unit="talk", quiet=quiet):
            order.append(talk.id)
            if done.get(talk.id, {}).get("status") != "refined":
                yield talk

    for record in _concurrently(worker, waiting(), settings.concurrency, stop):
        if record is None:
            report.left += 1
            continue
        earlier = done.get(record["id"])
        if earlier is not None:  # what its failure cost stays on the bill
            for key, tokens in earlier["usage"].items():
                record["usage"][key] += tokens
        done[record["id"]] = record
        append_jsonl(log, record)
    _in_order(log, done, order)
    for record in done.values():
        refined = record["status"] == "refined"
        report.refined, report.failed = report.refined + refined, report.failed + (not refined)
        if not refined:
            report.reasons[record["error"]] = report.reasons.get(record["error"], 0) + 1
    report.prompt_tokens, report.answer_tokens, report.money = budget.prompt, budget.answer, budget.money
    write_json(out / "report.json", report.to_dict())
    return report


def _check_folder(out: Path, settings: RefineSettings) -> None:
    path, decides = out / "settings.json", settings.decides()
    if path.exists() and read_json(path) != decides:
        raise ValueError(f"{out} was made with other settings (see {path.name}). Choose another folder.")
    write_json(path, decides)


def _concurrently(
    worker: _Worker, talks: Iterator[Conversation], concurrency: int, stop: threading.Event
) -> Iterator[dict[str, Any] | None]:
    """Records as they become ready; None for a conversation that the budget leaves out."""
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            pending: set[Future[dict[str, Any] | None]] = {
                pool.submit(worker, talk) for talk in islice(talks, concurrency)
            }
            while pending:
                ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
                pending |= {pool.submit(worker, talk) for talk in islice(talks, concurrency - len(pending))}
        finally:
            stop.set()  # whatever ends this, threads that wait for a repetition must not hold it up


class _Worker:
    """Refines one conversation; called from the pool's threads."""

    def __init__(self, client: Client, settings: RefineSettings, budget: Budget) -> None:
        self.client, self.settings, self.budget = client, settings, budget

    def __call__(self, talk: Conversation) -> dict[str, Any] | None:
        answers = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
        messages = [dict(message) for message in talk.messages]
        usage = {"prompt_tokens": 0, "answer_tokens": 0}
        record = {
            "id": talk.id,
            "source": talk.source,
            "license": talk.license,
            "category": talk.category,
            "model": self.settings.endpoint.model,
            "original": talk.messages,
            "usage": usage,
        }
        try:
            for place in answers if self.settings.turns == "all" else answers[-1:]:
                messages[place]["content"] = self._answer(messages[: place + 1], usage)
                messages[place].pop(REASONING, None)  # it led to the draft
        except (_Exhausted, RequestStopped):
            # An answer of several may be paid for already; a budget that keeps it is worth less than one that holds.
            if not any(usage.values()):
                return None
            return {**record, "status": "failed", "messages": talk.messages, "error": "budget used up half-way"}
        except RequestFailed as error:
            return {**record, "status": "failed", "messages": talk.messages, "error": str(error)}
        except Exception as error:  # noqa: BLE001 - counted and shown in the report; the others go on
            reason = f"{type(error).__name__}: {error}"
            return {**record, "status": "failed", "messages": talk.messages, "error": reason}
        return {**record, "status": "refined", "messages": messages}

    def _answer(self, messages: list[Message], usage: dict[str, int]) -> str:
        asked = prompt(self.settings.instruction, messages)
        # A token is at least one byte of text, so the bytes are the most that a prompt can have.
        most = sum(len(message["content"].encode()) + OVERHEAD for message in asked)
        longest, asides, billed, used = self.settings.endpoint.max_tokens, 0, 0, (0, 0)

        def allow() -> bool:
            nonlocal asides
            allowed = self.budget.reserve(most, longest)
            asides += allowed
            return allowed

        if not allow():
            raise _Exhausted
        try:
            answer = self.client.ask(asked, allow)
            billed = answer.perhaps_billed
            used = (_plausible(answer.prompt_tokens, most), _plausible(answer.answer_tokens, longest))
            return answer.text.strip()
        except RequestFailed as error:
            billed = error.perhaps_billed
            raise
        finally:
            used = (used[0] + most * billed, used[1] + longest * billed)
            self.budget.settle((most * asides, longest * asides), used)
            usage["prompt_tokens"] += used[0]
            usage["answer_tokens"] += used[1]


def _plausible(counted: int | None, most: int) -> int:
    """What a server counted; what it did not count, or counted beyond all sense, is taken as the most it can be.

    A server may count more than is sent, for its own words around it, but one odd number must not use up a budget.
    """
    return counted if counted is not None and counted <= 2 * most + SERVERS_OWN else most


def prompt(instruction: str, messages: list[Message]) -> list[Message]:
    """The request that asks for a better last message of `messages`."""
    before = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages[:-1])
    content = f"The conversation so far:\n\n{before}\n\nThe draft of the answer:\n\n{messages[-1]['content']}"
    return [{"role": "system", "content": instruction}, {"role": "user", "content": content}]


def _in_order(log: Path, done: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Write the file anew, one line for each conversation, in their order; lines of others stay behind them."""
    import json

    ids = [id for id in dict.fromkeys([*order, *done]) if id in done]
    with atomic_path(log) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(done[id], ensure_ascii=False) + "\n" for id in ids)
