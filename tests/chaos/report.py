"""A run as Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.ledger import WRONGS, Faults, Ledger
from tests.chaos.processes import Held, Process

START, WARM, END = "start", "warm", "end"
GROWTH, SLACK_MIB, SLACK_FILES = 1.15, 16.0, 32  # what a process may hold more at the end than warm


@dataclass(frozen=True, slots=True)
class Run:
    """What there is to tell."""

    seed: int
    seconds: float
    ended: str  # how it came to its end
    ledger: Ledger
    faults: Faults
    processes: list[Process]


def grown(process: Process) -> str:
    """What a process holds too much of at the end; empty when it is well or was not there before.

    A process that was killed has begun anew, so there is nothing to hold its end against.
    """
    warm, end = process.samples.get(WARM), process.samples.get(END)
    if warm is None or end is None or process.starts > 1:
        return ""
    if end.rss_mib > warm.rss_mib * GROWTH + SLACK_MIB:
        return f"{process.name}: {warm.rss_mib:.0f} MiB when warm, {end.rss_mib:.0f} at the end"
    for what in ("files", "threads", "tasks"):
        if getattr(end, what) > getattr(warm, what) + SLACK_FILES:
            words = f"{getattr(warm, what)} {what} when warm, {getattr(end, what)} at the end"
            return f"{process.name}: {words}"
    return ""


def markdown(run: Run) -> str:
    """The report."""
    return "\n".join(_lines(run)) + "\n"


def _lines(run: Run) -> Iterator[str]:
    ledger = run.ledger
    yield "# Chaos"
    yield ""
    cores = len(os.sched_getaffinity(0))
    yield f"Seed {run.seed}, {run.seconds:.0f} s of load on {cores} cores, {run.ended}."
    yield ""
    yield from _table(("what", "how many"), [("requests", ledger.requests)])
    yield f"| verdicts that callers of guards got | {ledger.verdicts} |"
    for wrong in WRONGS:
        yield f"| {wrong} | {ledger.wrongs[wrong]} |"
    yield ""
    yield "## What was broken"
    yield ""
    yield from _table(("fault", "times"), sorted(run.faults.counts.items()))
    yield ""
    yield "## What became of the requests"
    yield ""
    kinds = sorted(ledger.ended.items())
    yield from _table(("kind", "result", "how many"), [(*key, count) for key, count in kinds])
    yield ""
    yield "## Processes"
    yield ""
    yield "RSS in MiB, open files, threads and asyncio tasks: started / warm / at the end."
    yield ""
    yield from _table(
        ("process", "starts", "RSS", "files", "threads", "tasks"), map(_held, run.processes)
    )
    if ledger.told:
        yield ""
        yield "## What must not happen"
        yield ""
        yield from (f"- {words}" for words in ledger.told)


def _held(process: Process) -> tuple[object, ...]:
    moments = [process.samples.get(name) for name in (START, WARM, END)]

    def each(what: str) -> str:
        return " / ".join("-" if one is None else _number(one, what) for one in moments)

    columns = (each(what) for what in ("rss_mib", "files", "threads", "tasks"))
    return (process.name, process.starts, *columns)


def _number(held: Held, what: str) -> str:
    value = getattr(held, what)
    return "-" if value < 0 else f"{value:.0f}"


def _table(head: tuple[str, ...], rows: object) -> Iterator[str]:
    assert hasattr(rows, "__iter__")
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
