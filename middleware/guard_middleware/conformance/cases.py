"""The conformance set: requests that a guarded deployment must answer, attempts to get past it.

Data only. A case is the bytes of one connection; `conformance.run` sends them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from guard_middleware.conformance.framed import BEHIND_HEALTH, FRAMED, METHODS, TARGETS, Framing
from guard_middleware.conformance.requests import BENIGN, PROTOCOLS, Place, Protocol, post, turn
from guard_middleware.conformance.said import COMPLETIONS, SAID
from guard_middleware.conformance.spelled import PACKED, SPELLED


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes to send.

    `harmful` ones hold the text that must be blocked, or the request refused; `arguable` where a
    guard may find it harmless in that place. `spare` answers in front are to something else.
    """

    name: str
    protocol: str
    harmful: bool
    request: bytes
    spare: int = 0
    arguable: bool = False


def basics(place: Place, protocol: Protocol, harm: str) -> Iterator[Case]:
    """A harmless and a harmful request, whole and streamed; the harmless whole one comes first."""
    for harmful, text in ((False, BENIGN), (True, harm)):
        for stream in (False, True):
            path = (protocol.stream_path if stream else protocol.path).format(model=place.model)
            body = json.dumps(protocol.body(place.model, text, stream)).encode()
            kind = "harmful" if harmful else "harmless"
            name = f"{kind} request, {'streamed' if stream else 'whole'}"
            yield Case(name, protocol.name, harmful, post(place, path, body))


def attempts(place: Place, harm: str) -> Iterator[Case]:
    """Attempts to have a backend read `harm` unseen by the guard, by OpenAI's protocols."""
    chat = PROTOCOLS[0]
    body = json.dumps(chat.body(place.model, harm, False)).encode()
    for name, extra in SAID.items():
        said = {"model": place.model, "messages": turn(BENIGN), "max_tokens": 16, **extra(harm)}
        request = post(place, chat.path, json.dumps(said).encode())
        yield Case(name, chat.name, True, request, arguable=True)
    for name, spelled in SPELLED.items():
        yield _attempt(name, post(place, chat.path, spelled(body, harm)))
    for name, (headers, packed) in PACKED.items():
        yield _attempt(name, post(place, chat.path, packed(body), *headers, typed=False))
    for name, target in TARGETS.items():
        yield _attempt(name, post(place, chat.path, body, target=target))
    for name, method in METHODS.items():
        yield _attempt(name, post(place, chat.path, body, *method[1:], method=method[0]))
    for name, framed in FRAMED.items():
        request = framed(Framing(place, place.prefix + chat.path, body))
        yield _attempt(name, request, spare=name == BEHIND_HEALTH)
    for name, completion in COMPLETIONS.items():
        said = {"model": place.model, "prompt": BENIGN, **completion(harm)}
        request = post(place, "/v1/completions", json.dumps(said).encode())
        yield Case(name, "openai-text", True, request, arguable=True)


def _attempt(name: str, request: bytes, spare: int = 0) -> Case:
    return Case(name, "openai-chat", True, request, spare)
