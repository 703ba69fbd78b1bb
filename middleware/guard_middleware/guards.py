"""The seam between middleware and guard: a guard elsewhere, or one in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import AbstractContextManager, aclosing
from pathlib import Path
from typing import Protocol

import grpc

from guard_api.v1 import guard_pb2
from guard_middleware.bearer import TokenFile
from guard_middleware.breaker import Breaking
from guard_middleware.calls import Item, Piece
from guard_middleware.channel import TLS
from guard_middleware.client import AsyncGuardClient
from guard_middleware.errors import EngineFailed, GuardError
from guard_middleware.retry import Retries
from guard_middleware.service_info import PolicySummary
from guard_middleware.settings import Settings
from guard_middleware.targets import check_reachable
from guard_middleware.terms import Terms
from guard_middleware.tls_files import TlsFiles
from guard_middleware.tracing import Tracing, guard_call
from guard_middleware.turns import direction_of
from guard_middleware.verdict import Outcome, SeenImage, StreamOutcome, Unjudged
from guard_policies.assessment import Action, Direction

LOG = logging.getLogger(__name__)
LEAVE_S = 600.0  # for what began on a channel whose certificates were renewed since

Conversation = guard_pb2.Conversation


class Guard(Protocol):
    """Who judges. It never raises for want of a verdict: an Unjudged says what follows."""

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        """One outcome for each conversation, in order, and as many."""
        ...

    def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        """Outcomes on a growing reply to the conversation; the last one has `final`."""
        ...

    async def policy(self) -> PolicySummary | None:
        """What its policy wants of callers; None where that is not known."""
        ...

    async def ready(self) -> bool:
        """Whether it would judge now."""
        ...

    async def close(self) -> None:
        """Let go of it; calls under way are cancelled."""
        ...


class RemoteGuard:
    """A guard behind gRPC; its channel is made on first use, in the loop that uses it.

    What the caller got wrong counts as unjudged and blocks, whatever `on_unavailable` says: a
    request must not be able to choose its way past the guard.
    """

    def __init__(self, settings: Settings, terms: Terms | None = None) -> None:
        """Nothing is dialled yet. Raises ValueError where the target's kind cannot be had here."""
        if settings.guard:
            check_reachable(settings.guard, os.environ)
        self._settings = settings
        self._terms = terms or _terms(settings)
        self._made: AsyncGuardClient | None = None
        self._files = TlsFiles(self._terms.tls)
        self._leaving: set[asyncio.Task[None]] = set()  # clients whose certificates were renewed

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        """One outcome for each conversation, in order."""
        settings = self._settings
        directions = [direction_of(one) for one in conversations]
        try:
            client = await self._client()
            items = [Item(one, settings.policy, settings.language) for one in conversations]
            with guard_call("ClassifyBatch", settings.guard):
                entries = await client.classify_batch(items)
        except GuardError as error:
            return [self._settled(_blocked(error), way) for way in directions]
        return [
            self._settled(_blocked(entry) if isinstance(entry, GuardError) else entry, way)
            for entry, way in zip(entries, directions, strict=True)
        ]

    async def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        """Outcomes on a growing reply to the conversation; the last one has `final`."""
        settings = self._settings
        try:
            client = await self._client()
            stream = client.classify_stream(
                conversation, pieces, policy=settings.policy, language=settings.language
            )
            with guard_call("ClassifyStream", settings.guard):
                async with aclosing(stream) as outcomes:  # type: ignore[type-var]
                    async for one in outcomes:
                        settled = self._settled(one.outcome, Direction.RESPONSE)
                        yield dataclasses.replace(one, outcome=settled)
        except GuardError as error:
            yield StreamOutcome(self._settled(_blocked(error), Direction.RESPONSE), 0, final=True)

    async def image_at(self, url: str) -> SeenImage:
        """The image behind an address, judged by itself."""
        settings = self._settings
        try:
            client = await self._client()
            with guard_call("Classify", settings.guard):
                seen = await client.image_at(
                    url, policy=settings.policy, language=settings.language
                )
        except GuardError as error:
            seen = SeenImage(_blocked(error))
        return dataclasses.replace(seen, outcome=self._settled(seen.outcome, Direction.PROMPT))

    async def policy(self) -> PolicySummary | None:
        """What its policy wants of callers; None where that is not known."""
        try:
            return await (await self._client()).declared(self._settings.policy)
        except GuardError:
            return None

    async def ready(self) -> bool:
        """Whether it would judge now."""
        try:
            return await (await self._client()).health(timeout_s=2.0)
        except GuardError:
            return False

    async def close(self) -> None:
        """Let go of the channel."""
        client, self._made = self._made, None
        for task in self._leaving:
            task.cancel()
        if client is not None:
            await client.close()

    async def _client(self) -> AsyncGuardClient:
        if self._made is not None and self._files.renewed():
            before, self._made = self._made, None
            self._leaving.add(task := asyncio.create_task(before.close(LEAVE_S)))
            task.add_done_callback(self._leaving.discard)
            LOG.info("certificates of the channel to the guard were renewed")
        if self._made is None:
            self._made = AsyncGuardClient(self._settings.guard, self._terms)
        return self._made

    def _settled(self, outcome: Outcome, direction: Direction) -> Outcome:
        """With what our own settings say of a message that could not be judged."""
        if outcome.judged:
            if self._made is not None:
                self._made.saw(outcome.policy)
            return outcome
        settings = self._settings
        wish = {
            Direction.PROMPT: settings.on_unavailable_prompt,
            Direction.RESPONSE: settings.on_unavailable_response,
        }[direction]
        if wish == "policy" or outcome.error.code in _CALLERS:
            return outcome
        return dataclasses.replace(outcome, action=Action(wish))


class LocalGuard(RemoteGuard):
    """A guard in a thread of this process, behind a private socket; opened on first use."""

    def __init__(
        self, settings: Settings, terms: Terms | None = None, tracing: Tracing | None = None
    ) -> None:
        super().__init__(settings, terms)
        self._tracing = tracing
        self._served: AbstractContextManager[str] | None = None
        self._opening: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop it."""
        opening, self._opening = self._opening, None
        if opening is not None:
            await asyncio.gather(opening, return_exceptions=True)
        await super().close()
        served, self._served = self._served, None
        if served is not None:
            await asyncio.to_thread(served.__exit__, None, None, None)

    async def _client(self) -> AsyncGuardClient:
        while self._made is None:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._open(), name="guard-opening")
            await asyncio.shield(self._opening)  # a caller that leaves does not stop it
        return self._made

    async def _open(self) -> None:
        from guard_middleware import in_process  # heavy: only where it is asked for

        served = in_process.served(self._settings.model, self._tracing)
        try:
            target = await asyncio.to_thread(served.__enter__)
        except Exception as error:
            LOG.exception("the guard in this process did not start")
            raise EngineFailed("the guard in this process did not start") from error
        self._served, self._made = served, AsyncGuardClient(target, self._terms)


def _terms(settings: Settings) -> Terms:
    return Terms(
        timeout_s=settings.guard_timeout_s,
        stream_timeout_s=settings.guard_stream_timeout_s,
        retries=Retries(try_timeout_s=settings.guard_try_s),
        breaking=Breaking(settings.guard_failures, settings.guard_open_s),
        on_unavailable="policy",
        tls=_tls(settings),
        token=TokenFile(Path(settings.guard_token_file)) if settings.guard_token_file else None,
    )


def _tls(settings: Settings) -> TLS | None:
    if settings.guard_tls == "off":
        return None
    roots, certificate, key = (
        Path(path) if path else None
        for path in (
            settings.guard_tls_roots,
            settings.guard_tls_certificate,
            settings.guard_tls_key,
        )
    )
    return TLS(roots, certificate, key, settings.guard_tls_name)


def open_guard(settings: Settings, tracing: Tracing | None = None) -> Guard:
    """The guard that the settings name; nothing is dialled or loaded yet."""
    return RemoteGuard(settings) if settings.guard else LocalGuard(settings, tracing=tracing)


_CALLERS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)


def _blocked(error: GuardError) -> Unjudged:
    return Unjudged(Action.BLOCK, error.reason, error)
