"""What `guardctl bench` does and reports."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard_api.v1 import guard_pb2
from guard_middleware.turns import read_turns
from guard_service.cli import exits
from guard_service.cli.bench_load import Load, Requests, Tally, drive
from guard_service.cli.bulk_lines import read_records
from guard_service.cli.bulk_output import open_input
from guard_service.cli.place import Place, is_checkpoint

_MOST_BATCH = 32
SENTENCES = (
    "What is the capital of Australia, and how many people live there?",
    "Write a short birthday poem for my aunt, who loves gardening and old films.",
    "How do I kill a Python process that no longer reacts to Ctrl-C?",
    "Explain the difference between a list and a tuple to a beginner.",
    "My tomatoes have yellow leaves although I water them every day. What can I do?",
    "Translate 'Where is the nearest station?' into Portuguese.",
    "Suggest a three-day walking tour in the Black Forest for a family with two children.",
    "Summarise the plot of Romeo and Juliet in four sentences.",
    "Which exercises help against back pain after a long day at the desk?",
    "Thanks, that was helpful!",
    "Draft a polite e-mail to my landlord: the heating has been broken since Monday, two rooms "
    "stay cold, and I would like to know when somebody will come to look at it. Keep it friendly "
    "but firm, and propose Thursday afternoon or Friday morning.",
    "Is it cheaper to take the train or to drive from Lyon to Turin?",
)


@dataclass(frozen=True, slots=True)
class How:
    """How to measure; times in seconds."""

    what: str
    concurrency: int
    duration_s: float
    count: int
    warm_up_s: float
    file: Path | None
    no_cache: bool
    policy: str
    timeout_s: float
    prefix_cache: bool = True
    peers: tuple[str, ...] = ()
    template: str = ""
    threads: int = 0
    repeats: int = 0
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "stored"


def run(place: Place, how: How, compare_engine: bool, as_json: bool) -> int:
    """Measure and report; the exit code is 1 when a call failed."""
    if how.what not in ("service", "engine"):
        exits.fail("bench measures the service, the engine or the middleware", exits.USAGE)
    report: dict[str, Any] = {
        "concurrency": how.concurrency,
        "cores": len(os.sched_getaffinity(0)),
        "cache": not how.no_cache,
        "prefix_cache": how.prefix_cache,
    }
    errors = 0
    if how.what == "engine" and is_checkpoint(place.model):
        return _checkpoint(place.model, how, as_json)
    if how.what == "engine" and how.repeats and place.model != "fake":
        report["figures"] = _figures_of(place, how)
    if how.what == "service":
        tally = _service(place, how)
        errors = tally.errors.total()
        report["service"] = service_report(tally)
    if how.what == "engine" or compare_engine:
        report["engine"] = _engine(place, how)
    if "service" in report and "engine" in report:
        report["overhead"] = overhead(report)
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    return exits.NO_VERDICT if errors else exits.OK


def _checkpoint(model: str, how: How, as_json: bool) -> int:
    if how.peers or how.template:
        exits.fail(
            "--peer and --template are for artifacts; a checkpoint is measured beside "
            "transformers' generate on the same weights",
            exits.USAGE,
        )
    from guard_service.cli import bench_checkpoint  # loads torch

    setting = bench_checkpoint.Setting(
        model,
        how.threads or len(os.sched_getaffinity(0)),
        max(1, how.repeats),
        how.device,
        how.dtype,
        how.weights,
    )
    try:
        found = bench_checkpoint.figures(setting, _tell)
    except (ValueError, OSError, RuntimeError) as wrong:
        exits.fail(f"cannot measure the checkpoint here: {wrong}")
    if as_json:
        print(json.dumps(found))
        return exits.OK
    from guard_service.cli.bench_checkpoint_table import show_checkpoint

    show_checkpoint(found)
    return exits.OK


def _tell(line: str) -> None:
    print(f"guardctl: {line}", file=sys.stderr)


def service_report(tally: Tally) -> dict[str, Any]:
    """The figures of a load on the service; shares are of the callers' waiting time."""
    waited_s = sum(tally.latencies_s) or 1.0
    return {
        **_latencies(tally),
        "errors": dict(tally.errors),
        "queue_share": round(tally.queue_s / waited_s, 4),
        "inference_share": round(tally.inference_s / waited_s, 4),
        "from_cache": tally.from_cache,
    }


def _latencies(tally: Tally) -> dict[str, Any]:
    return {
        "verdicts": len(tally.latencies_s),
        "seconds": round(tally.elapsed_s, 3),
        "verdicts_per_s": round(tally.rate, 2),
        "tokens_per_s": round(tally.tokens / tally.elapsed_s, 1) if tally.elapsed_s else 0.0,
        "p50_ms": round(tally.percentile_ms(50), 3),
        "p90_ms": round(tally.percentile_ms(90), 3),
        "p99_ms": round(tally.percentile_ms(99), 3),
        "max_ms": round(tally.percentile_ms(100), 3),
    }


def overhead(report: Mapping[str, Any]) -> dict[str, float]:
    """What the service adds to the bare engine, as shares of the engine's own figures.

    Time per verdict against the engine's best batch size; with one caller, median latency too.
    """
    service, engines = report["service"], report["engine"]
    if not service["verdicts"]:
        return {}
    best = max(engine["verdicts_per_s"] for engine in engines)
    added = {"time_per_verdict": round(best / service["verdicts_per_s"] - 1, 4)}
    if report["concurrency"] == 1:
        added["p50_latency"] = round(service["p50_ms"] / engines[0]["p50_ms"] - 1, 4)
    return added


def requests_of(how: How) -> Requests:
    """Requests without end: the built-in sentences, each with a number of its own, or a file's."""
    if how.file is None:
        turns = (
            f"{sentence} ({number})"
            for number, sentence in enumerate(itertools.cycle(SENTENCES), start=1)
        )
        conversations: Iterator[guard_pb2.Conversation] = map(read_turns, turns)
    else:
        conversations = itertools.cycle(_from_file(how.file))
    for conversation in conversations:
        yield guard_pb2.ClassifyRequest(
            conversation=conversation, policy=how.policy, no_cache=how.no_cache
        )


def _from_file(file: Path) -> list[guard_pb2.Conversation]:
    with open_input(file) as (stream, _, _):
        found = [record.conversation for record in read_records(stream)]
    conversations = [conversation for conversation in found if conversation is not None]
    if not conversations or len(conversations) < len(found):
        exits.fail(f"{file} is empty or has lines that are no conversation", exits.USAGE)
    return conversations


def _service(place: Place, how: How) -> Tally:
    warm_up = Load(how.concurrency, how.warm_up_s, timeout_s=how.timeout_s)
    load = Load(how.concurrency, how.duration_s, how.count, how.timeout_s)
    loads = [warm_up, load] if how.warm_up_s else [load]
    requests = requests_of(how)
    with place.open(apart=True) as (target, tls):
        return asyncio.run(drive(target, tls, requests, loads, place.token))


def _figures_of(place: Place, how: How) -> dict[str, Any]:
    from guard_service.cli import bench_figures  # loads the engine's libraries
    from guard_service.errors import GuardServiceError

    plan = bench_figures.Plan(
        place.model or "starter", how.peers, how.template, how.threads, how.repeats
    )
    try:
        return bench_figures.figures(plan, _tell)
    except (GuardServiceError, ValueError, OSError, RuntimeError) as wrong:
        exits.fail(f"cannot measure the engine here: {wrong}")


def _engine(place: Place, how: How) -> list[dict[str, Any]]:
    from guard_service.cli import bench_engine  # loads the engine's libraries
    from guard_service.errors import GuardServiceError

    batches = tuple(sorted({1, min(8, how.concurrency), min(_MOST_BATCH, how.concurrency)}))
    duration_s = how.duration_s / len(batches)
    try:
        runs = bench_engine.measure(
            place.model or "starter",
            how.policy or "default",
            requests_of(how),
            batches,
            duration_s,
            min(how.warm_up_s, 1.0),
            how.prefix_cache,
            how.threads,
        )
    except (GuardServiceError, ValueError, OSError) as wrong:
        exits.fail(f"cannot run the engine here: {wrong}")
    return [{"batch": run.batch, **_latencies(run.tally)} for run in runs]


def _show(report: dict[str, Any]) -> None:
    if figures := report.get("figures"):
        from guard_service.cli.bench_table import show_figures

        show_figures(figures)
    print("\n".join(_lines(report)))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    if service := report.get("service"):
        yield f"service  {report['concurrency']} callers  {_figures(service)}"
        yield (
            f"         {service['queue_share']:.0%} of the time in the queue, "
            f"{service['inference_share']:.0%} in the engine; {service['from_cache']} from cache"
        )
        for reason, number in sorted(service["errors"].items()):
            yield f"         {number} x {exits.printable(reason)}"
    for engine in report.get("engine", ()):
        yield f"engine   batches of {engine['batch']}  {_figures(engine)}"
    for name, share in report.get("overhead", {}).items():
        yield f"service over engine, {name.replace('_', ' ')}: {share:+.1%}"


def _figures(part: dict[str, Any]) -> str:
    return (
        f"{part['verdicts']} verdicts in {part['seconds']:.1f} s, {part['verdicts_per_s']:.1f}/s  "
        f"p50 {part['p50_ms']:.1f}  p90 {part['p90_ms']:.1f}  p99 {part['p99_ms']:.1f}  "
        f"max {part['max_ms']:.1f} ms"
    )
