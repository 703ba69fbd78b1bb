"""Runs `guardctl middleware check`. Nothing that was sent or answered is ever shown."""

from __future__ import annotations

import json
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guard_middleware.conformance.run import HARM, Deployment, Outcome, Result, check, deployment
from guard_service.cli import exits

_MOST_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Asked:
    """What the options say."""

    upstream: str
    model: str
    unsafe_text: Path | None
    headers: tuple[str, ...]
    ca: Path | None
    timeout_s: float
    as_json: bool


def run(asked: Asked) -> int:
    """Try the deployment; returns the exit code."""
    where, harm = _deployment(asked), _harm(asked.unsafe_text)
    results: list[Result] = []
    try:
        for one in check(where, harm):
            results.append(one)
            if not asked.as_json:
                print(_line(one))
    except OSError as error:
        exits.fail(f"no connection to {asked.upstream}: {error.strerror or error}")
    if not results:
        exits.fail(
            "the deployment refuses harmless requests in every protocol: is --model a model that "
            "it has, and is there a --header that it wants?"
        )
    print(_as_json(asked, results) if asked.as_json else _summary(results))
    return exits.OK if all(one.ok for one in results) else exits.NO_VERDICT


def _deployment(asked: Asked) -> Deployment:
    try:
        tls = ssl.create_default_context(cafile=str(asked.ca)) if asked.ca else None
        return deployment(asked.upstream, asked.model, asked.headers, tls, asked.timeout_s)
    except (ValueError, ssl.SSLError) as wrong:
        exits.fail(f"{asked.upstream}: {wrong}", exits.USAGE)


def _harm(file: Path | None) -> str:
    if file is None:
        return HARM
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        exits.fail(f"{file}: cannot be read as text", exits.USAGE)
    if not 0 < len(text) <= _MOST_CHARS:
        exits.fail(f"{file}: must hold 1 to {_MOST_CHARS} characters", exits.USAGE)
    return text


def _line(one: Result) -> str:
    mark = "ok  " if one.ok else "FAIL"
    status = one.status or "-"
    return f"{mark} {one.outcome:<10} {status:<3} {one.case.protocol}: {one.case.name}"


def _summary(results: Sequence[Result]) -> str:
    counts = Counter(one.outcome for one in results)
    told = ", ".join(f"{counts[one]} {one}" for one in Outcome if counts[one])
    failed = [one for one in results if not one.ok]
    lines = [f"{len(results)} cases: {told}"]
    if passed := sum(
        one.ok and one.outcome is Outcome.ANSWERED and one.case.harmful for one in results
    ):
        lines.append(
            f"{passed} that stand elsewhere than in a prompt were judged and found harmless"
        )
    if any(one.outcome is Outcome.UNSCREENED for one in failed):
        lines.append("unscreened: a reply without a verdict's id, so that no guard has seen it")
    if any(one.outcome is Outcome.ANSWERED for one in failed):
        lines.append(
            "answered, though harmful: the guard saw it and let it pass. Perhaps it finds the text "
            "harmless: give --unsafe-text"
        )
    if any(not one.case.harmful for one in failed):
        lines.append("a harmless request that is not answered: is the guard there, and ready?")
    lines.append(f"{len(failed)} FAILED" if failed else "all is well")
    return "\n".join(lines)


def _as_json(asked: Asked, results: Sequence[Result]) -> str:
    cases = [
        {
            "name": one.case.name,
            "protocol": one.case.protocol,
            "harmful": one.case.harmful,
            "outcome": one.outcome,
            "status": one.status,
            "ok": one.ok,
        }
        for one in results
    ]
    ok = all(one.ok for one in results)
    return json.dumps({"upstream": asked.upstream, "ok": ok, "cases": cases})
