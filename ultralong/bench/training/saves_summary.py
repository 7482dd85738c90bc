"""What `ultralong bench saves` has measured, as a row, as a table's numbers and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from ultralong.bench.results import Row, all_rows, markdown
from ultralong.utils.units import GIB

Event = dict[str, Any]  # what was measured, its seconds, and of which save
THREADS = {"hash": "to hash", "write": "to hand over", "sync": "waiting for the disk"}
SMALL = 0.01  # share of a run's time that saves may take, for which their distance is told


def seconds_of(events: Sequence[Event], what: str, save: int | None = None) -> list[float]:
    """Seconds of the events of one kind: `free` or `beside` (steps), `reserved`, `copied`, `written` ..."""
    return [e["seconds"] for e in events if e["what"] == what and save in (None, e.get("save"))]


def summary(events: Sequence[Event], other_step: float | None = None) -> dict[str, Any]:
    """The numbers of what was measured so far.

    Args:
        events: In their order.
        other_step: Seconds of another step over the same states, whose share is wanted.

    Returns:
        `seconds_per_step`, the median of `free_seconds` (steps without a checkpoint), and `spread` (the slowest of
        them against it); of each background save, under `saves`, `copy_seconds`, `write_seconds` (once it is on disk),
        of these `plan_seconds` (until the processes had agreed who writes what) and `shard_seconds` (until the shards
        were on disk), `files` (of the first process, with the seconds of the thread of each: in all, hashing, handing
        to the system, waiting for the disk), `beside_seconds` of the steps and `slower_seconds` (of them together,
        against the median). `reserve_seconds`: of making the memory for copies before; where a row has none, the first
        copy made it. `checkpoint_gib` and `gib_per_second` (of its writing); `copy_seconds`: median of the copies but
        for the first, where there are others; `cost_seconds`: that, and the median of what steps take longer;
        `cost_of_a_step`, its share, `cost_of_other_step`, and `steps_for_a_percent`: how many steps from save to save
        make it 1% of the time. `waited_seconds` of a checkpoint that is waited for. What was not measured yet is left
        out.
    """
    free = seconds_of(events, "free")
    if not free:
        return {}
    usual = median(free)
    row: dict[str, Any] = {
        "seconds_per_step": round(usual, 4),
        "free_seconds": free,
        "spread": round(max(free) / usual - 1, 4),
    }
    if reserved := seconds_of(events, "reserved"):
        row["reserve_seconds"] = reserved[0]
    begun = sorted({event["save"] for event in events if event["what"] == "beside"})
    saves = [_save(events, number, usual) for number in begun]
    if saves:
        copies = seconds_of(events, "copied")
        copied = median(copies[1:] or copies)
        cost = copied + median(save["slower_seconds"] for save in saves)
        row |= {
            "saves": saves,
            "copy_seconds": round(copied, 4),
            "cost_seconds": round(cost, 4),
            "cost_of_a_step": round(cost / usual, 4),
            "steps_for_a_percent": max(1, math.ceil(cost / (SMALL * usual))),
        }
        if written := [event for event in events if event["what"] == "written"]:
            gib = max(event["bytes"] for event in written) / GIB
            rate = gib / median(event["seconds"] for event in written)
            row |= {"checkpoint_gib": round(gib, 3), "gib_per_second": round(rate, 3)}
        row |= {"other_step": other_step, "cost_of_other_step": round(cost / other_step, 5)} if other_step else {}
    if waited := seconds_of(events, "waited"):
        row["waited_seconds"] = waited[-1]
    return row


def _save(events: Sequence[Event], number: int, usual: float) -> dict[str, Any]:
    steps = seconds_of(events, "beside", number)
    row: dict[str, Any] = {"copy_seconds": seconds_of(events, "copied", number)[0]}
    for event in events:
        if event["what"] == "written" and event["save"] == number:
            row |= {"write_seconds": event["seconds"], "shard_seconds": event.get("shards")}
            row |= {"plan_seconds": event.get("plan"), "files": event.get("files", [])}
    return row | {"beside_seconds": steps, "slower_seconds": round(sum(step - usual for step in steps), 4)}


def written_in(row: dict[str, Any]) -> str:
    """How long the files of a save take; of one that was not waited for, how long it had taken."""
    written = [save["write_seconds"] for save in row["saves"] if "write_seconds" in save]
    return f"{median(written):.3g} s" if written else f"more than {sum(row['saves'][0]['beside_seconds']):.3g} s"


def told(event: Event) -> str:
    """One event as a line."""
    seconds = f"{event['seconds']:.3g} s"
    save = f"save {event['save'] + 1}" if "save" in event else "once more"
    if event["what"] in ("written", "waited"):
        size = f"{event['bytes'] / GIB:.3g} GiB"
        if event["what"] == "waited":
            return f"a checkpoint of {size} that is waited for: {seconds}"
        shards = f", its shards after {event['shards']:.3g} s" if "shards" in event else ""
        rate = f"{event['bytes'] / GIB / event['seconds']:.3g} GiB/s"
        return f"{save}: {size} written in {seconds}, {rate}{shards}{_threads(event)}"
    return {
        "ready": f"processes are up and warm after {seconds}",
        "free": f"a step: {seconds}",
        "reserved": f"memory for copies made in {seconds}",
        "copied": f"{save}: copied to the host in {seconds}",
        "beside": f"{save}: a step beside its writing: {seconds}",
    }[event["what"]]


def _threads(event: Event) -> str:
    """Where the time of the first process's threads went, on average."""
    if not (files := event.get("files")):
        return ""
    mean = {name: sum(file[name] for file in files) / len(files) for name in files[0]}
    said = (f"{mean[f'{name}_seconds']:.3g} s {text}" for name, text in THREADS.items())
    return f" ({event['plan']:.3g} s to plan; {len(files)} files beside each other: {', '.join(said)})"


def line(row: dict[str, Any]) -> str:
    """A measured row as text."""
    name = f"{row['model']}, {row['tokens']:,} tokens, {row['gpus']} x {row['gpu']}: "
    if "cost_seconds" not in row:
        return name + row.get("note", "no checkpoint was written in time") + "\n" + row.get("messages", "")[-1500:]
    first = f"the first in {row['saves'][0]['copy_seconds']:.3g} s"
    made = "reserve_seconds" in row
    first += f"; their memory made before in {row['reserve_seconds']:.3g} s" if made else ", with its memory"
    size = f" of {row['checkpoint_gib']:.3g} GiB" if "checkpoint_gib" in row else ""
    said = [
        f"{name}{row['seconds_per_step']:.3g} s a step (the slowest {row['spread']:+.0%})",
        f"a checkpoint{size} in the background: copied in {row['copy_seconds']:.3g} s ({first}), "
        f"written in {written_in(row)}",
        f"it takes {row['cost_seconds']:.3g} s of training, {row['cost_of_a_step']:.1%} of a step: a hundredth of the "
        f"time where {row['steps_for_a_percent']} steps or more lie from save to save",
    ]
    if "cost_of_other_step" in row:
        said.append(f"of a step of {row['other_step']:g} s it is {row['cost_of_other_step']:.2%}")
    if "waited_seconds" in row:
        said.append(f"waited for: {row['waited_seconds']:.3g} s")
    return "; ".join(said) + ("\n" + row["note"] if "note" in row else "")


def saves_table(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """What a checkpoint that is written in the background takes from a step.

    Args:
        recorded: What `ultralong bench saves --json` wrote.

    Returns:
        Lines of a Markdown table; none where nothing was recorded.
    """

    def cells(row: Row) -> list[str]:
        what = [row["model"], row["gpus"], f"{row['tokens']:,}", f"{row['seconds_per_step']:.2f}"]
        size = f"{row['checkpoint_gib']:.1f}" if "checkpoint_gib" in row else ""
        took = [f"{row['copy_seconds']:.2f} s", written_in(row), f"{row['cost_seconds']:.2f} s"]
        of_other = f" ({row['cost_of_other_step']:.2%} of {row['other_step']:.0f} s)" if "other_step" in row else ""
        waited = f"{row['waited_seconds']:.1f} s" if "waited_seconds" in row else ""
        return [*what, size, *took, f"{row['cost_of_a_step']:.1%}{of_other}", waited]

    rows = [row for row in all_rows(recorded) if "cost_seconds" in row]
    rows.sort(key=lambda row: (row["model"], row["gpus"], row["tokens"]))
    head = (
        "model | GPUs | tokens | seconds a step | checkpoint, GiB | copied in | written in | takes | of a step | "
        "waited for"
    )
    return markdown(head, map(cells, rows))
