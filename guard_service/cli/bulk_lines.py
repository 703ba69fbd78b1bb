"""The lines of a bulk run: what goes in, what comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from guard_api.v1 import guard_pb2
from guard_middleware.errors import GuardError
from guard_middleware.turns import read_turns
from guard_middleware.verdict import Verdict

# Longer lines are refused: memory stays bounded whatever the file holds.
MAX_LINE_BYTES = 16 * 2**20

Id = str | int | None
BAD_LINE = "BAD_LINE"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of input: a conversation, or what is wrong with the line."""

    line: int
    id: Id
    conversation: guard_pb2.Conversation | None
    language: str = ""
    wrong: str = ""
    file: str = ""  # of a folder


def read_lines(stream: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """The lines of a stream, None for one that is too long, and how many bytes each has."""
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        if len(raw) <= MAX_LINE_BYTES:
            yield raw, len(raw)
            continue
        size = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(MAX_LINE_BYTES)
            size += len(raw)
        yield None, size


def read_records(stream: BinaryIO, first: int = 1) -> Iterator[Record]:
    """The records of a stream in order; blank lines are none. Never raises for a line's content."""
    for number, (raw, _) in enumerate(read_lines(stream), first):
        if raw is None:
            yield Record(number, None, None, wrong=f"the line is over {MAX_LINE_BYTES} bytes")
        elif raw.strip():
            yield read_record(raw, number)


def read_record(raw: bytes, line: int) -> Record:
    """One line's record."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return Record(line, None, None, wrong="the line is not JSON in UTF-8")
    if not isinstance(found, dict):
        return Record(line, None, None, wrong="the line is not a JSON object")
    return record_of(found, line)


def record_of(found: Mapping[str, Any], line: int) -> Record:
    """The record of a line's fields, or of a row's."""
    own = _id(found.get("id"))
    try:
        return Record(line, own, _conversation(found), _language(found))
    except ValueError as wrong:
        return Record(line, own, None, wrong=str(wrong))


def _id(value: object) -> Id:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()  # what a lone surrogate becomes in OUT
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _conversation(found: Mapping[str, Any]) -> guard_pb2.Conversation:
    text, messages = found.get("text"), found.get("messages")
    if (text is None) == (messages is None):
        raise ValueError('the line needs either "messages" or "text"')
    role = found.get("target_role")
    if messages is None:
        return read_turns([{"role": role or "user", "content": text}])
    if not isinstance(messages, list):
        raise ValueError("messages is not a list")
    conversation = read_turns(messages)
    if role is not None and messages[-1]["role"] != role:
        raise ValueError("target_role is not the role of the last message")
    return conversation


def _language(found: Mapping[str, Any]) -> str:
    language = found.get("language")
    if language is not None and not isinstance(language, str):
        raise ValueError("language is not a text")
    return language or ""


def verdict_line(record: Record, verdict: Verdict) -> bytes:
    """The output line of a judged record."""
    return _line(
        record,
        action=verdict.action.value,
        unsafe_score=_rounded(verdict.unsafe_score),
        scores={code: _rounded(score) for code, score in verdict.scores.items()},
        error=None,
        complete=verdict.coverage.complete,
        shadow_action=verdict.shadow_action.value if verdict.shadow_action else None,
        **stamp(verdict),
        **({"tier": verdict.model.tier} if verdict.model.tier else {}),
    )


def error_line(record: Record, error: GuardError | None) -> bytes:
    """The output line of a record without verdict; without `error` the line itself is wrong."""
    said = f"{error.reason}: {error.args[0]}" if error else f"{BAD_LINE}: {record.wrong}"
    return _line(record, action=None, unsafe_score=None, scores={}, error=said)


def stamp(verdict: Verdict) -> dict[str, str]:
    """What must not change in the middle of a file: who judged, by which rules."""
    return {
        "policy": f"{verdict.policy.name}@{verdict.policy.version}",
        "policy_digest": short(verdict.policy.digest),
        "model": verdict.model.name,
        "model_digest": short(verdict.model.digest),
    }


def same_judge(before: Mapping[str, str], verdict: Verdict) -> bool:
    """Whether a verdict was made as those before it; in a cascade the model may vary."""
    now = stamp(verdict)
    keys = ["policy_digest"] if verdict.model.tier else ["policy_digest", "model_digest"]
    return all(before[key] == now[key] for key in keys)


def short(digest: str) -> str:
    """Enough of a digest to tell two apart."""
    return digest.removeprefix("sha256:")[:12]


def _line(record: Record, **fields: Any) -> bytes:
    place = {"file": record.file} if record.file else {}
    whole = {"id": record.id, **place, "line": record.line, **fields}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _rounded(score: float) -> float:
    """Six significant digits: enough to sort by, half the bytes."""
    return float(f"{score:.6g}") if math.isfinite(score) else score
