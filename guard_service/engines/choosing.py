"""The kernel plan that is fastest on this machine, of those that score the golden prompts right."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from guard_service.artifact import Artifact
from guard_service.engines import EngineFailed
from guard_service.engines.loading import device_for, plans_of
from guard_service.engines.onnx import OnnxEngine
from guard_service.engines.plans import AUTO, FP32, STORED
from guard_service.engines.prepared import Prepared

LOG = logging.getLogger(__name__)
_ENOUGH_S = 0.3  # of measuring, after which small differences do not matter
_ROUNDS = 5
_MOST_FLOATS = 100_000_000  # parameters; above, reading 4 bytes a weight has never been fastest


def open_artifact(
    artifact: Artifact,
    threads: int,
    prefix_cache: bool,
    session_bytes: int,
    plan: str,
    lanes: int,
    folder: Path | None,
    device: str,
) -> OnnxEngine:
    """The artifact's engine by the named plan, or by the fastest. Raises EngineFailed."""
    prepared, device = Prepared(folder), device_for(device)
    if plan == AUTO and device == "cuda":
        plan = STORED
    if plan == AUTO:
        plan = _remembered(artifact, threads, prepared) or _measured(artifact, threads, prepared)
    return OnnxEngine(
        artifact,
        threads,
        prefix_cache,
        session_bytes=session_bytes,
        plan=plan,
        lanes=lanes,
        prepared=prepared,
        device=device,
    )


def _remembered(artifact: Artifact, threads: int, prepared: Prepared) -> str | None:
    plan = prepared.choice(artifact.digest, threads)
    return plan if plan in plans_of(artifact) else None


def _measured(artifact: Artifact, threads: int, prepared: Prepared) -> str:
    """Open each plan, let it score the golden prompts, and remember the fastest."""
    small = artifact.manifest.parameters <= _MOST_FLOATS
    candidates = [plan for plan in plans_of(artifact) if small or plan != FP32]
    if candidates == [STORED] or not artifact.manifest.golden:
        return STORED
    seconds: dict[str, float] = {}
    failures: list[EngineFailed] = []
    for plan in candidates:
        try:
            seconds[plan] = _time(artifact, threads, plan, prepared)
        except EngineFailed as error:
            LOG.warning("kernel plan %s is not used: %s", plan, error)
            failures.append(error)
    if not seconds:
        raise failures[0]
    best = min(seconds, key=lambda plan: seconds[plan])
    prepared.choose(artifact.digest, threads, best, seconds)
    shown = ", ".join(f"{plan} {took / seconds[best]:.2f}" for plan, took in seconds.items())
    LOG.info("kernel plan %s (times relative to it: %s)", best, shown)
    return best


def _time(
    artifact: Artifact,
    threads: int,
    plan: str,
    prepared: Prepared,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds for the golden prompts, the best of some rounds. Raises EngineFailed."""
    engine = OnnxEngine(artifact, threads, plan=plan, prepared=prepared)
    try:
        engine.self_test()  # and so every prefix is there
        rounds: list[float] = []
        while len(rounds) < _ROUNDS and sum(rounds) < _ENOUGH_S:
            began = clock()
            for golden in artifact.manifest.golden:
                engine.score(golden.turns)
            rounds.append(clock() - began)
        return min(rounds)
    finally:
        engine.close()
