"""A recorded verdict beside one of today: what exactly differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from guard_api.v1 import verdict_pb2

Told = Mapping[str, Any]
_ACTIONS = {
    verdict_pb2.ACTION_ALLOW: "allow",
    verdict_pb2.ACTION_FLAG: "flag",
    verdict_pb2.ACTION_BLOCK: "block",
}
_DIRECTIONS = {
    verdict_pb2.DIRECTION_PROMPT: "prompt",
    verdict_pb2.DIRECTION_RESPONSE: "response",
}


def differences(entry: Told, verdict: verdict_pb2.Verdict) -> list[str]:
    """One text for each difference, what scores rest on first. Floats count to the last bit."""
    then, now = _recorded(entry), _said(verdict)
    return [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]


def _recorded(entry: Told) -> dict[str, object]:
    return {
        "model": entry["model"]["digest"],
        "policy": entry["policy"]["digest"],
        "tier": entry["tier"],
        "direction": entry["direction"],
        "action": entry["action"],
        "shadow action": entry.get("shadow_action", ""),
        "unsafe": entry["unsafe"],
        **dict(_scores(entry["scores"], entry["fired"])),
        "windows": [tuple(window) for window in entry["coverage"]["windows"]],
        "coverage is complete": entry["coverage"]["complete"],
        "tokens": entry["coverage"]["tokens"],
    }


def _said(verdict: verdict_pb2.Verdict) -> dict[str, object]:
    windows = verdict.coverage.windows
    return {
        "model": verdict.model.digest,
        "policy": verdict.policy.digest,
        "tier": verdict.model.tier,
        "direction": _DIRECTIONS.get(verdict.direction, ""),
        "action": _ACTIONS.get(verdict.action, ""),
        "shadow action": _ACTIONS.get(verdict.shadow_action, ""),
        "unsafe": verdict.unsafe_score,
        **dict(
            _scores(
                {one.code: one.score for one in verdict.categories},
                {one.code: one.threshold for one in verdict.categories if one.fired},
            )
        ),
        "windows": [(one.first_token, one.end_token, one.unsafe_score) for one in windows],
        "coverage is complete": verdict.coverage.complete,
        "tokens": verdict.coverage.conversation_tokens,
    }


def _scores(scores: Told, fired: Told) -> Iterator[tuple[str, object]]:
    for code, score in scores.items():
        yield f"score of {code}", score
        yield f"threshold that {code} reached", fired.get(code)
