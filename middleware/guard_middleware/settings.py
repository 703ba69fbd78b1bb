"""Settings of middleware and sidecar: each knob, its default and its reason."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from guard_middleware.targets import check_target

ENVIRONMENT_PREFIX = "GUARDED_"
MIB = 2**20


class SettingsError(ValueError):
    """Every mistake in the settings, one line each."""


def _knob(default: Any, why: str, low: float = 0, high: float = float("inf")) -> Any:
    return field(default=default, metadata={"why": why, "low": low, "high": high})


def _choice(default: str, why: str, *others: str) -> Any:
    return field(default=default, metadata={"why": why, "choices": (default, *others)})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set. `Settings()` enforces with the starter guard, in process."""

    guard: str = _knob(
        "",
        "host:port or unix:/path of a guard, dns:///host:port of several; empty: one in this "
        "process",
    )
    guard_tls: str = _choice("off", "whether the channel to the guard is encrypted", "on")
    guard_tls_roots: str = _knob("", "PEM file of roots to trust; empty: the system's")
    guard_tls_certificate: str = _knob("", "PEM file of our certificate, for guards that ask")
    guard_tls_key: str = _knob("", "PEM file of its key")
    guard_tls_name: str = _knob("", "name in the guard's certificate where it is another")
    guard_token_file: str = _knob(
        "", "file with a bearer token for the guard, read anew when it changes; needs TLS"
    )
    model: str = _knob("starter", "model of the guard in this process: a name or a folder")
    policy: str = _knob("", "name of the guard's policy; empty is the guard's default")
    language: str = _knob("", "BCP 47 tag of what is said; chooses thresholds where a policy does")
    guard_timeout_s: float = _knob(10.0, "for one verdict, retries included", 0.001, 3600)
    guard_try_s: float = _knob(
        0.0,
        "a call without an answer for so long is made again, to another guard where there are "
        "several; 0: never",
        0,
        3600,
    )
    guard_failures: int = _knob(
        5, "after so many calls in a row that got no answer the guard is left alone; 0: never"
    )
    guard_open_s: float = _knob(2.0, "for so long; then one call tries", 0.001, 3600)
    guard_stream_timeout_s: float = _knob(3600.0, "for the verdicts on one whole stream", 0.001)

    tracing: str = _choice(
        "off",
        "spans of screened requests, to the application's OpenTelemetry, or OTEL_* for a sidecar",
        "on",
    )
    mode: str = _choice("enforce", "shadow judges and reports, and changes nothing", "shadow")
    refusal: str = _knob(
        "", "what is said in place of what was blocked; empty: what the policy says, in `language`"
    )
    refuse_with: str = _choice(
        "answer", "a reply with finish reason content_filter, or HTTP 400", "error"
    )
    old_turns: str = _choice(
        "drop",
        "what becomes of a turn of the past that is not allowed: its exchange is left out of what "
        "is forwarded; or the request is blocked; or the past is not judged again",
        "block",
        "pass",
    )
    system_turns: str = _choice(
        "judge", "system and developer turns, tool definitions: judged, or the operator's", "trust"
    )
    unscannable: str = _choice(
        "policy",
        "requests with what no guard can read: audio, image addresses, token ids",
        "block",
        "pass",
    )
    image_urls: str = _choice(
        "refuse",
        "images given by address: what no guard can read, or fetched by the guard, whose policy "
        "must let it, and forwarded as they were judged",
        "guard",
    )
    on_unavailable_prompt: str = _choice(
        "policy", "when a request could not be judged", "block", "allow"
    )
    on_unavailable_response: str = _choice(
        "policy", "when a reply could not be judged", "block", "allow"
    )
    prompt_check: str = _choice(
        "before", "the backend is called after the request's verdict, or beside it", "beside"
    )

    guarded: tuple[str, ...] = _knob(
        ("/v1", "/api", "/generate", "/generate_stream", "/completion", "/completions")
        + ("/chat", "/inference", "/invocations", "/model", "/infill"),
        "prefixes of paths where what no format knows is refused",
    )
    unknown: str = _choice("refuse", "requests on guarded prefixes that no format knows", "pass")
    passes: tuple[str, ...] = _knob(
        (), "more paths that pass unread, on top of health, models and metrics; * is one segment"
    )

    first_check_chars: int = _knob(
        0, "the first check of a stream comes this early; 0: as its policy says"
    )
    piece_chars: int = _knob(
        0,
        "a stream's text goes to the guard in pieces of this size; 0: of what its policy judges "
        "at a time",
    )
    sentence_pieces: str = _choice(
        "policy", "and also where a sentence ends, if its policy judges there", "on", "off"
    )
    hold_back_chars: int = _knob(
        0,
        "of what a verdict allowed so many of the last characters wait for the next one; 0: as its "
        "policy says",
    )
    hold_chars: int = _knob(
        4096, "so much text held back asks for a verdict at once, and stops reading", 1
    )
    idle_check_s: float = _knob(0.25, "a stream that pauses has what it said judged", 0.001)
    keep_alive_s: float = _knob(10.0, "a stream that is held back sends a sign of life", 0.001)

    max_body_bytes: int = _knob(32 * MIB, "a request's body, unpacked", 1)
    max_reply_bytes: int = _knob(32 * MIB, "a reply that is not streamed, unpacked", 1)
    max_messages: int = _knob(1000, "turns of one request", 1)
    max_channels: int = _knob(128, "texts that grow in one stream (choices, tool calls, ...)", 1)

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise SettingsError("\n".join(problems))


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
_TYPES = typing.get_type_hints(Settings)


def from_environment(environment: Mapping[str, str] = os.environ, **given: Any) -> Settings:
    """Settings from GUARDED_*, with `given` on top. Raises SettingsError with every mistake."""
    found = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX)
    }
    return _made({**_read_all(found), **given})


def from_flags(flags: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from texts, with the environment's below them. Raises SettingsError."""
    return from_environment(environment, **_read_all(flags))


def _made(values: dict[str, Any]) -> Settings:
    if unknown := [name for name in values if name not in FIELDS]:
        raise SettingsError(f"{', '.join(unknown)}: there is no such setting")
    return Settings(**values)


def _read_all(texts: Mapping[str, str]) -> dict[str, Any]:
    return {name: _read(name, text, _TYPES.get(name, str)) for name, text in texts.items()}


def _read(key: str, value: str, kind: Any) -> Any:
    try:
        if kind in (int, float):
            return kind(value)
    except ValueError:
        raise SettingsError(f"{key}: is not a number") from None
    if kind is str:
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _problems(settings: Settings) -> typing.Iterator[str]:
    for name, knob in FIELDS.items():
        value = getattr(settings, name)
        choices = knob.metadata.get("choices")
        if not _is(value, _TYPES[name]):
            yield f"{name}: must be {_NAMES.get(_TYPES[name], 'a list of texts')}"
        elif choices and value not in choices:
            yield f"{name}: {value!r} is none of {', '.join(choices)}"
        elif _TYPES[name] in (int, float):
            low, high = knob.metadata["low"], knob.metadata["high"]
            if not low <= value <= high:
                yield f"{name}: {value} is not between {low} and {high}"
    if settings.guard and isinstance(settings.guard, str):
        try:
            check_target(settings.guard)
        except ValueError as wrong:
            yield f"guard: {wrong}"
    for name in ("guarded", "passes"):
        paths = getattr(settings, name)
        if isinstance(paths, tuple) and not all(str(path).startswith("/") for path in paths):
            yield f"{name}: paths begin with /"
    if bool(settings.guard_tls_certificate) != bool(settings.guard_tls_key):
        yield "guard_tls_certificate, guard_tls_key: one needs the other"
    if settings.guard_token_file and not settings.guard:
        yield "guard_token_file: needs guard; one in this process wants no token"


_NAMES = {int: "a whole number", float: "a number", str: "a text"}


def _is(value: object, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, str):
        return type(value) is kind
    return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
