"""TGI's own protocol, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from guard_middleware.formats.tgi import Tgi
from tests.middleware.asgi_calls import EVENTS, sse
from tests.middleware.formats.speech import Said

WHOLE, STREAM = "/generate", "/generate_stream"
DETAILS = {"finish_reason": "eos_token", "generated_tokens": 3, "input_length": 1, "seed": None}


def token(text: str, special: bool = False) -> dict[str, Any]:
    """A token."""
    return {"id": 7, "text": text, "logprob": -0.5, "special": special}


def asking(said: str = "Hi", **parameters: Any) -> dict[str, Any]:
    """A request."""
    return {"inputs": said, "parameters": parameters}


def step(text: str, index: int = 1, **more: Any) -> dict[str, Any]:
    """One event of a stream."""
    event = {"index": index, "token": token(text), "generated_text": None, "details": None}
    return {**event, **more}


def last(said: str, index: int = 9) -> dict[str, Any]:
    """The event that ends a stream which said this."""
    end = token("<|eot_id|>", special=True)
    return step("", index, token=end, generated_text=said, details=DETAILS)


def steps(said: str, size: int = 4) -> list[dict[str, Any]]:
    """The events of a stream that says this."""
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    events = [step(piece, index + 1) for index, piece in enumerate(pieces)]
    return [*events, last(said, len(pieces) + 1)]


def chunks(events: Sequence[object]) -> list[bytes]:
    """Server-sent events as TGI writes them: no space behind the colon."""
    return [sse(event, done=False).replace(b"data: ", b"data:", 1) for event in events]


class TgiSpeech:
    """Completions."""

    format = Tgi()
    path = WHOLE
    stream_path = STREAM
    stream_type = EVENTS
    channels: tuple[str, ...] = ("content", "alternatives", "unknown")
    most_choices = 1

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return asking(said, details=True, top_n_tokens=1)

    def whole(self, said: Mapping[Said, str]) -> bytes:
        texts = {one.channel: text for one, text in said.items()}
        content = texts.get("content", "")
        details: dict[str, Any] = {**DETAILS, "prefill": [], "tokens": [token(content)]}
        if "alternatives" in texts:
            details["top_tokens"] = [[token(texts["alternatives"])]]
        more = {"note": texts["unknown"]} if "unknown" in texts else {}
        return json.dumps({"generated_text": content, "details": details, **more}).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        events = []
        for number, (said, text) in enumerate(pieces):
            if said.channel == "content":
                events.append(step(text, number))
            elif said.channel == "alternatives":
                events.append(step("", number, top_tokens=[token(text)]))
            else:
                events.append(step("", number, note=text))
        content = "".join(text for said, text in pieces if said.channel == "content")
        return chunks([*events, last(content, len(events))])

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[str, str] = defaultdict(str)
        if not streamed:
            reply = json.loads(body)
            reply = reply[0] if isinstance(reply, list) else reply
            found["content"] = reply["generated_text"]
            for ranked in reply["details"].get("top_tokens", ()):
                found["alternatives"] += ranked[0]["text"]
            found["unknown"] = reply.get("note", "")
        else:
            events = streamed_events(body)
            for event in events:
                if not event["token"]["special"]:
                    found["content"] += event["token"]["text"]
                for one in event.get("top_tokens", ()):
                    found["alternatives"] += one["text"]
                found["unknown"] += event.get("note", "")
            assert events[-1]["details"] and events[-1]["generated_text"] == found["content"]
        return {Said(0, channel): text for channel, text in found.items()}

    def refused(self, body: bytes, streamed: bool) -> bool:
        end = streamed_events(body)[-1] if streamed else json.loads(body)
        end = end[0] if isinstance(end, list) else end
        return bool(end["details"]["finish_reason"] == "content_filter")


class TgiListSpeech(TgiSpeech):
    """The same at /, where whole replies come in a list."""

    path = stream_path = "/"

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return {**asking(said, details=True), "stream": stream}

    def whole(self, said: Mapping[Said, str]) -> bytes:
        return b"[" + super().whole(said) + b"]"


def streamed_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream."""
    assert body.endswith(b"\n\n")
    blocks = [block for block in body.split(b"\n\n") if block not in (b"", b":")]
    assert all(block.startswith(b"data:") for block in blocks)
    return [json.loads(block.removeprefix(b"data:")) for block in blocks]
