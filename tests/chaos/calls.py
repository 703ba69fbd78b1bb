"""Calls of the contract, straight to a guard, and what their answers must be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import grpc.aio

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2
from guard_middleware.channel import open_aio_channel
from tests.chaos.journal import now
from tests.chaos.ledger import Faults, Ledger
from tests.chaos.script import UNSAFE_WORD
from tests.chaos.truth import ADVICE, NOISE, SHIELD, Known, Policies, action_of, fake_knows, said
from tests.service.security.issuing import secure_channel

DEADLINE_S = 20.0
_AFTER_S = 10.0  # behind its deadline a call that has not ended is lost
_LEAVES = 0.05  # of calls, whose callers vanish
_ANEW = 0.2  # on connections of their own
_TOO_LARGE = 5 * 2**20


@dataclass
class Guard:
    """A guard as its callers know it. `knows` holds what is asked of it; empty: of the fake one."""

    name: str
    channel: grpc.aio.Channel
    knows: Sequence[Known] = ()
    models: Collection[str] = ()  # digests that its verdicts may have; empty: any
    opens: Callable[[], grpc.aio.Channel] | None = None  # a connection of its own, with TLS

    @classmethod
    def at(
        cls,
        name: str,
        target: str,
        knows: Sequence[Known] = (),
        roots: bytes | None = None,
        models: Collection[str] = (),
    ) -> Guard:
        """Inside the loop that uses it; with `roots` by TLS."""
        if roots is None:
            return cls(name, open_aio_channel(target, None), knows)
        return cls(
            name,
            secure_channel(target, roots),
            knows,
            models,
            lambda: secure_channel(target, roots),
        )

    @property
    def stub(self) -> guard_pb2_grpc.GuardServiceAsyncStub:
        """To call."""
        stub: guard_pb2_grpc.GuardServiceAsyncStub
        stub = guard_pb2_grpc.GuardServiceStub(self.channel)
        return stub

    @asynccontextmanager
    async def anew(self) -> AsyncIterator[Guard]:
        """The same guard through a handshake of its own, where it has TLS."""
        if self.opens is None:
            yield self
            return
        async with self.opens() as channel:
            yield replace(self, channel=channel)


class Caller:
    """Asks guards, one call at a time."""

    def __init__(
        self,
        ledger: Ledger,
        faults: Faults,
        policies: Policies,
        draw: random.Random,
        cases: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._faults = faults
        self._policies = policies
        self._draw = draw
        self._cases = cases

    async def call(self, guard: Guard) -> None:
        """One of any kind."""
        kinds = {
            "unary": (self._unary, 5),
            "batch": (self._batch, 2),
            "stream": (self._stream, 3),
            "invalid": (self._invalid, 1),
        }
        names, weights = list(kinds), [weight for _, weight in kinds.values()]
        kind = self._draw.choices(names, weights)[0]
        name = f"{kind}, {guard.name}"
        self._ledger.asked[name] += 1
        began = now()
        work = asyncio.ensure_future(self._made(kinds[kind][0], guard))
        leaves = self._draw.random() < _LEAVES
        try:
            async with asyncio.timeout(
                self._draw.random() * 0.1 if leaves else DEADLINE_S + _AFTER_S
            ):
                result = await work
        except TimeoutError:
            result = "left"
            if not leaves:
                result = "no end"
                self._ledger.wrong("lost", f"{name}: no end {_AFTER_S:g} s after its deadline")
        except grpc.aio.AioRpcError as error:
            result = error.code().name
            if not self._faults.explain((guard.name,), began):
                self._ledger.wrong("unexplained", f"{name}: {result} {error.details()}")
        self._ledger.ended[name, result] += 1

    async def _made(self, call: Callable[[Guard], Awaitable[str]], guard: Guard) -> str:
        if self._draw.random() < _ANEW:
            async with guard.anew() as apart:
                return await call(apart)
        return await call(guard)

    def _ask(self, guard: Guard) -> tuple[Known, guard_pb2.ClassifyRequest]:
        known = (
            self._draw.choice(guard.knows) if guard.knows else fake_knows(self._draw, self._cases())
        )
        request = guard_pb2.ClassifyRequest(
            conversation=known.conversation,
            policy=self._draw.choice((SHIELD, ADVICE)),
            no_cache=self._draw.random() < 0.8,
        )
        return known, request

    async def _unary(self, guard: Guard) -> str:
        known, request = self._ask(guard)
        reply = await guard.stub.Classify(request, timeout=DEADLINE_S)
        self._check(guard, known, request.policy, reply.verdict)
        return "verdict"

    async def _batch(self, guard: Guard) -> str:
        began = now()
        asked = [self._ask(guard) for _ in range(self._draw.randrange(2, 9))]
        batch = guard_pb2.ClassifyBatchRequest(requests=[request for _, request in asked])
        reply = await guard.stub.ClassifyBatch(batch, timeout=DEADLINE_S)
        if len(reply.results) != len(asked):
            self._ledger.wrong("lost", f"{len(reply.results)} results of {len(asked)} items")
        for (known, request), result in zip(asked, reply.results, strict=False):
            if result.HasField("verdict"):
                self._check(guard, known, request.policy, result.verdict)
            else:
                self._ledger.ended[
                    f"item of a batch, {guard.name}", f"code {result.error.code}"
                ] += 1
                if not self._faults.explain((guard.name,), began):
                    self._ledger.wrong("unexplained", f"item of a batch: {result.error.message}")
        self._same([result.verdict for result in reply.results if result.HasField("verdict")])
        return "verdict"

    async def _stream(self, guard: Guard) -> str:
        policy = self._draw.choice((SHIELD, ADVICE))
        known, user, reply = self._grows(guard)
        start = guard_pb2.StreamStart(conversation=user, policy=policy)

        async def steps() -> AsyncIterator[guard_pb2.ClassifyStreamRequest]:
            yield guard_pb2.ClassifyStreamRequest(start=start)
            for at in range(0, len(reply), 20):
                piece = guard_pb2.StreamPiece(
                    text=reply[at : at + 20], check=self._draw.random() < 0.2
                )
                yield guard_pb2.ClassifyStreamRequest(piece=piece)
                await asyncio.sleep(self._draw.random() * 0.01)
            yield guard_pb2.ClassifyStreamRequest(piece=guard_pb2.StreamPiece(end=True))

        seen: list[guard_pb2.ClassifyStreamResponse] = []
        async for one in guard.stub.ClassifyStream(steps(), timeout=DEADLINE_S):
            seen.append(one)
            if not one.final and not guard.knows:
                prefix = Known(user, UNSAFE_WORD in reply[: one.covered_chars])
                self._check(guard, prefix, policy, one.verdict)
        if not seen or not seen[-1].final or seen[-1].covered_chars != len(reply):
            self._ledger.wrong("lost", f"a stream of {guard.name} ended without its last verdict")
            return "no end"
        self._check(guard, known, policy, seen[-1].verdict)
        self._same([one.verdict for one in seen])
        return "verdict"

    def _grows(self, guard: Guard) -> tuple[Known, guard_pb2.Conversation, str]:
        """What is known of a whole exchange, its first turn, and the reply that grows."""
        if guard.knows:
            replies = [one for one in guard.knows if len(one.conversation.messages) > 1]
            known = self._draw.choice(replies)
            reply = known.conversation.messages[-1].parts[0].text
            return known, guard_pb2.Conversation(messages=known.conversation.messages[:1]), reply
        unsafe = self._draw.random() < 0.3
        words = ["the water is warm"] * self._draw.randrange(2, 30)
        if unsafe:
            words[self._draw.randrange(len(words))] = UNSAFE_WORD
        user, reply = f"And then? (case {self._cases()})", ", ".join(words)
        return Known(said(user, reply), unsafe), said(user), reply

    async def _invalid(self, guard: Guard) -> str:
        """What no guard can take, and the status it must get."""
        wrong = {
            "INVALID_ARGUMENT": guard_pb2.ClassifyRequest(),
            "NOT_FOUND": guard_pb2.ClassifyRequest(conversation=said("Hi"), policy="no-such"),
            "RESOURCE_EXHAUSTED": guard_pb2.ClassifyRequest(conversation=said("x" * _TOO_LARGE)),
        }
        code = self._draw.choice(list(wrong))
        try:
            await guard.stub.Classify(wrong[code], timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if error.code().name == code:
                return code
            raise
        self._ledger.wrong("wrong", f"a verdict in place of {code}")
        return "verdict"

    def _check(self, guard: Guard, known: Known, asked: str, verdict: verdict_pb2.Verdict) -> None:
        self._ledger.verdicts += 1
        policy = verdict.policy
        if policy.name != asked or not self._policies.fits(policy):
            words = f"{policy.name} {policy.version} {policy.digest}, asked for {asked}"
            self._ledger.wrong("mixed", words)
        elif verdict.action != action_of(policy.name, policy.version, known.unsafe):
            action = verdict_pb2.Action.Name(verdict.action)
            words = f"{guard.name}: {action} by {policy.name} {policy.version}"
            self._ledger.wrong("wrong", f"{words}, unsafe: {known.unsafe}")
        if guard.models and verdict.model.digest not in guard.models:
            self._ledger.wrong("mixed", f"{guard.name}: a model that nobody put there")
        if known.score is not None and abs(known.score - verdict.unsafe_score) > NOISE:
            words = f"{guard.name}: score {verdict.unsafe_score:.4f}, alone {known.score:.4f}"
            self._ledger.wrong("wrong", words)

    def _same(self, verdicts: Sequence[verdict_pb2.Verdict]) -> None:
        """Within one call every policy has one digest, and so has the model."""
        policies = {(one.policy.name, one.policy.digest) for one in verdicts}
        models = {one.model.digest for one in verdicts}
        if len(policies) != len({name for name, _ in policies}) or len(models) > 1:
            self._ledger.wrong("mixed", "two versions of a policy or model in one call")
