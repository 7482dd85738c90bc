"""Exercises of 12_many_hosts."""

from __future__ import annotations

import math
from typing import Any

from ultralong.course.exercise import Exercise, Mistake
from ultralong.training.config import DataSource, ParallelConfig, TrainConfig
from ultralong.training.process_checks import process_problem


def _run(context_parallel_size: int, global_batch_size: int, shard: int | None = None) -> TrainConfig:
    return TrainConfig(
        model="model",
        out="run",
        data=(DataSource("rows"),),
        steps=100,
        global_batch_size=global_batch_size,
        parallel=ParallelConfig(context_parallel_size=context_parallel_size, fsdp_shard_degree=shard),
    )


# ---- 12.mesh


def mesh(hosts: int, gpus: int, tokens: int, most: int) -> tuple[int, int]:
    """The fewest GPUs for a row with at most `most` tokens each, and the smallest global batch that fits them."""
    world = hosts * gpus
    share = next(n for n in range(1, world + 1) if world % n == 0 and tokens <= n * most)
    return share, world // share


def _mesh_too_wide(hosts: int, gpus: int, tokens: int, most: int) -> tuple[int, int]:
    return hosts * gpus, 1


def _mesh_one_row(hosts: int, gpus: int, tokens: int, most: int) -> tuple[int, int]:
    return mesh(hosts, gpus, tokens, most)[0], 1


def _mesh_ceiling(hosts: int, gpus: int, tokens: int, most: int) -> tuple[int, int]:
    share = -(-tokens // most)
    return share, max(1, hosts * gpus // share)


def _mesh_in_one_host(hosts: int, gpus: int, tokens: int, most: int) -> tuple[int, int]:
    return gpus, hosts


def _check_mesh(answer: Any) -> str:
    for hosts, gpus, tokens, most in ((4, 8, 2**22, 2**18), (6, 8, 2**21, 150_000), (2, 8, 2**20, 2**17)):
        right, found = mesh(hosts, gpus, tokens, most), answer(hosts, gpus, tokens, most)
        what = f"{hosts} hosts of {gpus} GPUs, rows of {tokens:,} tokens, at most {most:,} a GPU"
        assert isinstance(found, tuple | list) and len(found) == 2, (
            f"Give (context_parallel_size, rows of a step): {found!r}."
        )
        share, rows = map(int, found)
        assert share * most >= tokens, (
            f"{what}: {share} GPUs for a row leave {tokens / share:,.0f} tokens on each. A row may reach over hosts."
        )
        assert hosts * gpus % share == 0, (
            f"{what}: {hosts * gpus} processes do not split into groups of {share}. Round up to a divisor."
        )
        assert share == right[0], f"{what}: {right[0]} GPUs for a row are enough; {share} leave fewer rows at a time."
        problem = process_problem(_run(share, rows), hosts * gpus)
        assert problem is None, (
            f"{what}: the launcher refuses it, as each group of GPUs needs a row. It says: {problem}"
        )
        assert rows == right[1], f"{what}: {right[1]} rows a step are the smallest batch, yours has {rows}."
    return "the fewest GPUs that hold a row, and one row for each group of them."


# ---- 12.repair

# Two hosts of eight GPUs: what someone wrote.
BROKEN = {
    "context_parallel_size": 6,
    "global_batch_size": 3,
    "fsdp_shard_degree": 12,
    "steps": 1000,
    "save_every": 1000,
}
_REPAIRED = {**BROKEN, "context_parallel_size": 8, "global_batch_size": 4, "fsdp_shard_degree": 16, "save_every": 50}


def _check_repair(answer: Any) -> str:
    assert isinstance(answer, dict) and set(answer) == set(BROKEN), f"Give a dict with the keys {', '.join(BROKEN)}."
    assert answer["steps"] == BROKEN["steps"], "The number of steps was right: a repair changes what is wrong only."
    share, rows, shard = (answer[key] for key in ("context_parallel_size", "global_batch_size", "fsdp_shard_degree"))
    problem = process_problem(_run(share, rows, shard), 16)
    assert problem is None, f"Two hosts of eight GPUs can't start it. The launcher says: {problem}"
    assert share > 1 and share <= 8, f"{share} GPUs for a row: 8, one host, keeps most of the traffic inside it."
    assert rows <= 2 * BROKEN["global_batch_size"], f"{rows} rows a step are another run; stay near the {3} of before."
    assert 0 < answer["save_every"] <= answer["steps"] // 10, (
        f"save_every {answer['save_every']}: a lost host would cost up to {answer['save_every'] or answer['steps']} of "
        f"{answer['steps']} steps. Save at least ten times."
    )
    return "it starts on 16 GPUs, and a lost host costs few steps."


# ---- 12.dead

# What two hosts wrote, shortened; each is (logs by host, the host that was lost).
LOGS = (
    (
        [
            "train: step 16\nRuntimeError: Connection closed by peer [10.0.0.2]:41201\n"
            "host 0: exit code 1, attempt 2 from ./run/checkpoints/step-0000015\n",
            "train: step 16\n",
        ],
        1,
    ),
    (
        [
            "train: step 30\ntrain: step 31\n",
            "train: step 31\nRuntimeError: Connection reset by peer [10.0.0.1]:50112\n"
            "host 1: exit code 1, attempt 2 from ./run/checkpoints/step-0000030\n",
        ],
        0,
    ),
    (
        [
            "train: step 7\nRuntimeError: Connection closed by peer [10.0.0.3]:39444\nhost 0: exit code 1, attempt 2\n",
            "train: step 7\nRuntimeError: Connection closed by peer [10.0.0.3]:39446\nhost 1: exit code 1, attempt 2\n",
            "train: step 5\ntrain: step 6\ntrain: step 7\n",
        ],
        2,
    ),
)


def dead_host(logs: list[str]) -> int:
    """The host that was lost: it said nothing of an error, it just stopped."""
    return next(host for host, text in enumerate(logs) if "exit code" not in text and "Error" not in text)


def _check_dead(answer: Any) -> str:
    for logs, right in LOGS:
        found = answer(list(logs))
        assert isinstance(found, int) and 0 <= found < len(logs), (
            f"Give a host's number, 0 to {len(logs) - 1}: {found!r}."
        )
        assert found == right or "Error" not in logs[found], (
            f"Host {found} wrote an error, so it was alive to write it: it lost its connection to another. Who lost "
            "power writes nothing."
        )
        assert found == right, f"Host {right} stopped without a word; you name host {found}."
    return "the loud hosts are the survivors; the quiet one is gone."


# ---- 12.interval


def save_interval(step_seconds: float, save_seconds: float, hosts: int, hours: float) -> int:
    """Steps between checkpoints by Young's rule: sqrt(2 x cost of one x mean time to a failure of any host)."""
    return max(1, round(math.sqrt(2 * save_seconds * hours * 3600 / hosts) / step_seconds))


def _interval(step: float, save: float, hosts: float, hours: float, unit: float = 3600.0) -> int:
    return max(1, round(math.sqrt(2 * save * hours * unit / hosts) / step))


def _check_interval(answer: Any) -> str:
    for step, save, hosts, hours in ((30.0, 60.0, 4, 2000.0), (12.0, 20.0, 32, 5000.0)):
        right, found = save_interval(step, save, hosts, hours), float(answer(step, save, hosts, hours))
        what = f"Steps of {step:g} s, {save:g} s a checkpoint, {hosts} hosts, {hours:,g} h between failures of one"
        assert abs(found / (right * math.sqrt(hosts)) - 1) > 0.02, (
            f"{what}: {found:.0f} steps are right for one host. {hosts} hosts fail {hosts} times as often."
        )
        assert abs(found / (right / 60) - 1) > 0.1, f"{what}: {found:.0f} steps. Hours and seconds are mixed up."
        assert abs(found / (right * step) - 1) > 0.02, f"{what}: {found:.0f} are seconds; give steps."
        assert abs(found / right - 1) < 0.02, (
            f"{what}: about {right} steps between checkpoints, yours {found:.0f}. Young: the square root of 2 x the "
            "cost of a checkpoint x the mean time between failures."
        )
    return "rare failures and dear checkpoints mean long intervals, but only by the square root."


EXERCISES = (
    Exercise(
        name="12.mesh",
        title="GPUs for a row, rows for a step",
        task=(
            "Write `mesh(hosts, gpus, tokens, most)`: the fewest GPUs that share a row with at most `most` tokens each "
            "(they have to divide all GPUs), and the smallest number of rows a step: (context_parallel_size, rows)."
        ),
        check=_check_mesh,
        solution=mesh,
        mistakes=(
            Mistake("all GPUs", _mesh_too_wide, "leave fewer rows"),
            Mistake("one row", _mesh_one_row, "each group of GPUs needs a row"),
            Mistake("no divisor", _mesh_ceiling, "Round up to a divisor"),
            Mistake("one host", _mesh_in_one_host, "may reach over hosts"),
        ),
        hints=(
            "tokens / most, rounded up, is the least; then look for the next divisor of hosts x gpus.",
            "hosts x gpus / context_parallel_size groups each read a row of their own.",
        ),
        minutes=8,
    ),
    Exercise(
        name="12.repair",
        title="Repair a config",
        task="Give `BROKEN` with what is wrong repaired, for two hosts of eight GPUs.",
        check=_check_repair,
        solution=_REPAIRED,
        mistakes=(
            Mistake(
                "only the row", {**BROKEN, "context_parallel_size": 8, "fsdp_shard_degree": 16}, "not a multiple of"
            ),
            Mistake("shards left", {**_REPAIRED, "fsdp_shard_degree": 12}, "fsdp_shard_degree is 12"),
            Mistake("saves once", {**_REPAIRED, "save_every": 1000}, "Save at least ten times"),
            Mistake("fewer steps", {**_REPAIRED, "steps": 100}, "changes what is wrong only"),
        ),
        hints=(
            "16 processes: which numbers divide 16?",
            "With 8 GPUs a row there are two groups, so a step takes an even number of rows.",
            "How many steps are lost when a host dies just before the first checkpoint?",
        ),
        minutes=6,
    ),
    Exercise(
        name="12.dead",
        title="Which host died?",
        task="Write `dead_host(logs)`: what each host wrote, by number; which one was lost? Examples are in `LOGS`.",
        check=_check_dead,
        solution=dead_host,
        mistakes=(
            Mistake(
                "the one with the error",
                lambda logs: next(host for host, text in enumerate(logs) if "Error" in text),
                "alive to write it",
            ),
            Mistake("counts from 1", lambda logs: dead_host(logs) + 1, "0 to 1: 2"),
            Mistake("a name", lambda logs: f"host-{dead_host(logs)}", "0 to 1: 'host-1'"),
        ),
        hints=(
            "Who writes the error: the host that lost power, or the one that waited for it?",
            "Look for the log without an error and without an exit code.",
        ),
        difficulty="easy",
        minutes=4,
    ),
    Exercise(
        name="12.interval",
        title="How often to save",
        task=(
            "Write `save_interval(step_seconds, save_seconds, hosts, hours)`: steps between checkpoints by Young's "
            "rule; one host fails every `hours` hours on average."
        ),
        check=_check_interval,
        solution=save_interval,
        mistakes=(
            Mistake("one host", lambda s, c, n, h: _interval(s, c, 1, h), "times as often"),
            Mistake("hours", lambda s, c, n, h: _interval(s, c, n, h, 1.0), "mixed up"),
            Mistake("seconds", lambda s, c, n, h: math.sqrt(2 * c * h * 3600 / n), "are seconds"),
            Mistake("no square root", lambda s, c, n, h: 2 * c * h * 3600 / n / s, "square root"),
        ),
        hints=(
            "Mean time between failures of the whole job: hours / hosts.",
            "Young (1974): interval = sqrt(2 x save_seconds x mean time between failures), in seconds.",
        ),
        minutes=6,
    ),
)
