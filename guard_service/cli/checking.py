"""What `guardctl check` does once its options are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard_middleware.client import GuardClient
from guard_middleware.errors import GuardError
from guard_middleware.terms import Terms
from guard_middleware.turns import Turns, read_turns
from guard_middleware.verdict import Verdict
from guard_service.cli import exits, show
from guard_service.cli.place import Place


@dataclass(frozen=True, slots=True)
class Given:
    """What is to be judged, as the command line gives it."""

    text: str | None
    file: Path | None
    images: tuple[Path, ...]
    role: str
    context: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """How it is to be judged."""

    policy: str
    language: str
    timeout_s: float


def run(given: Given, place: Place, ask: Ask, as_json: bool) -> int:
    """Judge and report; the exit code."""
    try:
        turns = read_turns(_turns(given))
    except (ValueError, OSError) as wrong:
        exits.fail(str(wrong), exits.USAGE)
    try:
        with place.open() as (target, tls):
            terms = Terms(timeout_s=ask.timeout_s, tls=tls, token=place.token)
            with GuardClient(target, terms) as guard:
                verdict = guard.classify(turns, policy=ask.policy, language=ask.language)
                notice = _notice(guard, verdict.model.name) if verdict.judged else ""
    except GuardError as error:
        return _not_judged(error, as_json)
    assert verdict.judged  # the client raises unless told otherwise
    if as_json:
        print(verdict_json(verdict, notice))
    else:
        show.show_verdict(show.console(), verdict, notice)
    return exits.BY_ACTION[verdict.action]


def verdict_json(verdict: Verdict, notice: str) -> str:
    """All of a verdict in one line of JSON."""
    whole = json.loads(show.as_json(verdict))
    return json.dumps({**whole, "notice": notice})


def _not_judged(error: GuardError, as_json: bool) -> int:
    if as_json:
        about = {"reason": error.reason, "message": error.args[0], "request_id": error.request_id}
        print(json.dumps({"judged": False, **about}))
    print(f"guardctl: could not judge: {exits.printable(str(error))}", file=sys.stderr)
    return exits.NO_VERDICT


def _notice(guard: GuardClient, model: str) -> str:
    """What must be shown with the model; a verdict is shown even where this cannot be asked."""
    try:
        models = guard.info(timeout_s=2.0).models
    except GuardError:
        return ""
    return next((info.notice for info in models if info.model.name == model), "")


def _turns(given: Given) -> Turns:
    if given.file is not None:
        if given.text is not None or given.images or given.context:
            raise ValueError("--file holds all of it; leave out TEXT, --image and --context")
        return _conversation(_read(given.file))
    if given.role not in ("user", "assistant"):
        raise ValueError("--role is user or assistant")
    text = _text(given)
    content: list[Mapping[str, Any]] = [
        {"type": "image", "data": path.read_bytes()} for path in given.images
    ]
    if text is not None:
        content.append({"type": "text", "text": text})
    turns: list[Mapping[str, Any]] = [{"role": given.role, "content": content}]
    for earlier in reversed(given.context):
        role = "assistant" if turns[0]["role"] == "user" else "user"
        turns.insert(0, {"role": role, "content": earlier})
    return turns


def _text(given: Given) -> str | None:
    if given.text is None and given.images:
        return None
    piped = given.text is None and not sys.stdin.isatty()
    if given.text == "-" or piped:
        text = _decoded(sys.stdin.buffer.read()).removesuffix("\n").removesuffix("\r")
        if not text:
            raise ValueError("there is nothing on standard input")
        return text
    if given.text is None:
        raise ValueError("nothing to judge: give TEXT, - for standard input, --file or --image")
    return given.text


def _read(file: Path) -> str:
    return _decoded(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("the input is not UTF-8") from None


def _conversation(text: str) -> Sequence[Mapping[str, Any]]:
    try:
        read = json.loads(text)
    except json.JSONDecodeError as wrong:
        raise ValueError(
            f"the conversation is not JSON: line {wrong.lineno}, column {wrong.colno}"
        ) from None
    except RecursionError:
        raise ValueError("the conversation is nested too deeply") from None
    turns = read.get("messages") if isinstance(read, dict) else read
    if not isinstance(turns, list):
        raise ValueError('the conversation is neither a list of turns nor {"messages": [...]}')
    return turns
