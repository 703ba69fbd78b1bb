"""Chats through sidecar and application, streamed and whole, and what their clients must get."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.chaos.journal import now
from tests.chaos.ledger import Faults, Ledger
from tests.chaos.script import HEADER, NEVER, UNSAFE_WORD, Script
from tests.chaos.truth import REFUSALS, picture

PATH = "/v1/chat/completions"
PATIENCE_S = 60.0  # of a client: the guard's time, the backend's and more
_LEAVES, _DIES, _INVALID, _PICTURES = 0.06, 0.06, 0.05, 0.3
_RESULTS = {"stop": "passed", "content_filter": "refused"}


@dataclass(frozen=True, slots=True)
class Door:
    """Where clients come in, and what explains, when it is broken, that they get no verdict.

    For a stream each of `rests_on`; for a whole reply each of `alone`, and all `guards` at once,
    since one can answer for another.
    """

    name: str
    port: int
    rests_on: tuple[str, ...]
    alone: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Of chats."""
        return f"http://127.0.0.1:{self.port}{PATH}"


@dataclass
class Got:
    """What a client makes of a reply."""

    text: str = ""
    finish: str = ""
    error: str = ""
    ended: bool = False

    @property
    def said(self) -> str:
        """What the backend said of it."""
        text = self.text
        for refusal in REFUSALS:
            text = text.removesuffix(refusal)
        return text


class Client:
    """Asks through doors, one chat at a time."""

    def __init__(
        self,
        ledger: Ledger,
        faults: Faults,
        draw: random.Random,
        http: aiohttp.ClientSession,
        cases: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._faults = faults
        self._draw = draw
        self._http = http
        self._cases = cases

    async def chat(self, door: Door) -> None:
        """One of any kind."""
        if self._draw.random() < _INVALID:
            await self._invalid(door)
            return
        script, streamed = self._script(), self._draw.random() < 0.6
        image = self._draw.random() < _PICTURES
        kind = "streamed chat" if streamed else "chat"
        name = f"{kind}{' with image' if image else ''}, {door.name}"
        self._ledger.asked[name] += 1
        leaves = self._draw.random() < _LEAVES
        began, result = now(), "left"
        try:
            async with asyncio.timeout(self._draw.random() * 0.2 if leaves else PATIENCE_S):
                status, got = await self._asked(door, script, streamed, image)
            broken = self._explained(door, streamed, began)
            result = self._result(name, script, status, got, broken)
        except TimeoutError:
            if not leaves:
                result = "no end"
                self._ledger.wrong("lost", f"{name}: no end within {PATIENCE_S:g} s")
        except (aiohttp.ClientError, OSError) as error:
            result = "broken off"
            self._ledger.wrong("lost", f"{name}: {type(error).__name__}")
        except ValueError as error:
            result = "unreadable"
            self._ledger.wrong("wrong", f"{name}: what came is no reply: {error}")
        self._ledger.ended[name, result] += 1

    def _explained(self, door: Door, streamed: bool, began: float) -> bool:
        faults = self._faults
        if streamed:
            return faults.explain(door.rests_on, began)
        together = bool(door.guards) and faults.explain_all(door.guards, began)
        return together or faults.explain(door.alone, began)

    def _script(self) -> Script:
        draw = self._draw
        pieces = draw.randrange(4, 40)
        return Script(
            case=self._cases(),
            pieces=pieces,
            unsafe_at=draw.randrange(pieces) if draw.random() < 0.25 else NEVER,
            dies_at=draw.randrange(pieces) if draw.random() < _DIES else NEVER,
            pause_s=draw.choice((0.0, 0.0, 0.005, 0.03)),
            unsafe_prompt=draw.random() < 0.25,
        )

    async def _asked(
        self, door: Door, script: Script, streamed: bool, image: bool
    ) -> tuple[int, Got]:
        shown = image and self._draw.random() < 0.5  # then the picture is what is unsafe
        unsafe_words = script.unsafe_prompt and not shown
        text = f"Tell me of a {UNSAFE_WORD if unsafe_words else 'kettle'} (case {script.case})"
        content: Any = text
        if image:
            file = picture(self._draw, script.unsafe_prompt and shown)
            uri = f"data:image/png;base64,{base64.b64encode(file).decode()}"
            content = [
                {"type": "text", "text": text},
                {"type": "image_url", "image_url": {"url": uri}},
            ]
        body = {
            "model": "chaos",
            "stream": streamed,
            "messages": [{"role": "user", "content": content}],
        }
        headers = {HEADER: script.header()}
        async with self._http.post(door.url, json=body, headers=headers) as reply:
            if reply.content_type == "text/event-stream":
                return reply.status, await self._read(reply)
            if reply.status >= 500 and reply.content_type != "application/json":
                return reply.status, Got(error="error", ended=True)  # the application server's own
            return reply.status, whole(await reply.read())

    async def _read(self, reply: aiohttp.ClientResponse) -> Got:
        got = Got()
        async for line in reply.content:
            if line.startswith(b"data: "):
                add(got, line[6:].strip())
        return got

    def _result(self, name: str, script: Script, status: int, got: Got, broken: bool) -> str:
        ledger, said = self._ledger, got.said
        self._hold_to_truth(name, script, said)
        if got.error or status >= 500:
            if script.dies_at == NEVER and not broken:
                ledger.wrong("unexplained", f"{name}: {status} {got.error}")
            return f"{status} {got.error}"
        if status != 200 or not got.ended or got.finish not in _RESULTS:
            ledger.wrong("lost", f"{name}: {status}, finish reason {got.finish!r}, without an end")
            return f"{status}, no end"
        safe = not (script.unsafe or script.unsafe_prompt)
        if got.finish == "content_filter":
            if safe and not broken:
                ledger.wrong("unexplained", f"{name}: refused, though it is safe")
            return "refused" if not safe else "refused for want of a verdict"
        if not safe:
            ledger.wrong("leaked", f"{name}: passed, though it is unsafe")
        elif said != script.text:
            ledger.wrong("wrong", f"{name}: {len(said)} of {len(script.text)} characters passed")
        return "passed"

    def _hold_to_truth(self, name: str, script: Script, said: str) -> None:
        ledger = self._ledger
        if said:
            ledger.received[script.case] = len(said)
        if UNSAFE_WORD in said or (said and script.unsafe_prompt):
            ledger.wrong("leaked", f"{name}: {len(said)} characters of an unsafe exchange")
        if not script.text.startswith(said):
            ledger.wrong("wrong", f"{name}: text that the backend did not say")

    async def _invalid(self, door: Door) -> None:
        """What cannot be screened, and the status it must get."""
        name = f"invalid, {door.name}"
        self._ledger.asked[name] += 1
        path, body, wanted = self._draw.choice(
            (
                (PATH, b'{"messages": [', 400),
                (PATH, b'{"messages": [], "messages": []}', 400),
                ("/v1/no-such-thing", b"{}", 403),
            )
        )
        url = door.url.removesuffix(PATH) + path
        headers = {"content-type": "application/json"}
        try:
            async with asyncio.timeout(PATIENCE_S):
                async with self._http.post(url, data=body, headers=headers) as reply:
                    await reply.read()
                    status = reply.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._ledger.wrong("lost", f"{name}: {type(error).__name__}")
            status = 0
        if status not in (0, wanted):
            self._ledger.wrong("wrong", f"{name}: {status} in place of {wanted}")
        self._ledger.ended[name, str(status)] += 1


def whole(body: bytes) -> Got:
    """A reply that was not streamed. Raises ValueError."""
    value = json.loads(body)
    if "error" in value:
        return Got(error=_words_of(value), ended=True)
    (choice,) = value["choices"]
    return Got(choice["message"]["content"] or "", choice["finish_reason"], ended=True)


def add(got: Got, data: bytes) -> None:
    """One event's data. Raises ValueError."""
    if data == b"[DONE]":
        got.ended = True
        return
    value = json.loads(data)
    if "error" in value:
        got.error = _words_of(value)
    for choice in value.get("choices", ()):
        got.text += choice["delta"].get("content") or ""
        got.finish = choice["finish_reason"] or got.finish


def _words_of(value: Any) -> str:
    error = value["error"]
    return str(error.get("code") or error.get("type") or "error")
