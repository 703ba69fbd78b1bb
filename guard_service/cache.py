"""What was judged before: assessments by exact model input, and one run for identical callers."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from guard_policies.assessment import Direction
from guard_service.conversation import Image
from guard_service.prompt import Prompt

Value = TypeVar("Value")


def key_of(
    model_digest: str,
    policy_digest: str,
    direction: Direction,
    language: str,
    prompts: Sequence[Prompt],
    whose: str = "",
) -> bytes:
    """32 bytes that stand for one tenant's question: every token counts, nothing is folded."""
    digest = hashlib.sha256()
    _add(digest, model_digest, policy_digest, direction.value, language, whose)
    for prompt in prompts:
        _add(digest, *prompt.categories)
        if prompt.image is not None:
            _add(digest, *_shown(prompt.image))
        for tokens in (prompt.prefix, prompt.body, prompt.closing):
            digest.update(len(tokens).to_bytes(4, "big") + array("I", tokens).tobytes())
    return digest.digest()


def _shown(image: Image) -> tuple[str | bytes, ...]:
    """What stands for an image: its picture, where it was decoded, else where it comes from."""
    if image.picture is not None:
        return (image.picture.digest,)
    return image.uri or "", image.data or b""


def _add(digest: hashlib._Hash, *words: str | bytes) -> None:
    digest.update(len(words).to_bytes(4, "big"))
    for word in words:
        encoded = word.encode() if isinstance(word, str) else word
        digest.update(len(encoded).to_bytes(4, "big") + encoded)


class LruCache(Generic[Value]):
    """At most `entries` values, the least recently used one goes first. For one event loop."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._values: OrderedDict[bytes, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> Value | None:
        """The value, which becomes the most recently used; None when there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: bytes, value: Value) -> None:
        """Remember a value."""
        if self._entries:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._entries:
                self._values.popitem(last=False)


@dataclass(slots=True)
class _Flight(Generic[Value]):
    task: asyncio.Task[Value]
    waiting: int = field(default=0)


class SingleFlight(Generic[Value]):
    """Runs one computation for all who ask for the same at the same time.

    The computation is cancelled when the last who waits for it is gone.
    """

    def __init__(self) -> None:
        self._flights: dict[bytes, _Flight[Value]] = {}

    async def run(
        self, key: bytes, compute: Callable[[], Coroutine[Any, Any, Value]]
    ) -> tuple[Value, bool]:
        """The result of `compute`, and whether another caller had begun that computation."""
        flight = self._flights.get(key)
        joined = flight is not None
        if flight is None:
            flight = _Flight(asyncio.create_task(compute()))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda task: self._landed(key, task))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task), joined
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._forget(key, flight.task)
                flight.task.cancel()

    def _landed(self, key: bytes, task: asyncio.Future[Value]) -> None:
        if not task.cancelled():
            task.exception()  # seen, even when nobody waits any more
        self._forget(key, task)

    def _forget(self, key: bytes, task: asyncio.Future[Value]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
