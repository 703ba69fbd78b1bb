"""Attacks on a running service: what each gets is what deploy/SECURITY.md says, and nothing else.

After each, an honest caller of another tenant gets a verdict.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from tests.service.asking import PATIENCE_S, Running, asked, piece, refusal_of, start
from tests.service.conftest import RunGuard
from tests.service.security.callers import (
    PUBLIC_PEM,
    STRANGER,
    Auth,
    Metadata,
    bearer,
    claims,
    signed,
)
from tests.service.security.issuing import Authority, Issued, secure_channel
from tests.service.security.test_jwts import by_hand

SECURITY = Path(__file__).parents[3] / "deploy" / "SECURITY.md"
ROW = re.compile(r"^\| ([^|]+) \| `([A-Z_ ]+)` \|", re.MULTILINE)
LOCAL = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Target:
    """A guard with an auth file, TLS or not, and who may call it."""

    guard: Running
    acme: str  # a token
    honest: str  # a token of another tenant
    old: str  # a token that has expired
    ca: Authority

    @property
    def address(self) -> str:
        return self.guard.server.address

    def plain(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, LOCAL)

    def secure(self, own: Issued | None) -> grpc.aio.Channel:
        return secure_channel(self.address, self.ca.root, own)


Attack = Callable[[Target], Awaitable[str]]
ATTACKS: dict[str, Attack] = {}
BY_TLS: set[str] = set()


def attack(name: str, tls: bool = False) -> Callable[[Attack], Attack]:
    def added(function: Attack) -> Attack:
        ATTACKS[name] = function
        BY_TLS.update({name} if tls else ())
        return function

    return added


async def outcome(call: Any) -> str:
    """The code and reason that a call ends with."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await call
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {refusal_of(error).reason}".strip()
    return "OK"


async def drained(call: Any) -> None:
    """A stream to its end."""
    async for _ in call:
        pass


def with_metadata(name: str, metadata: Callable[[Target], Metadata]) -> None:
    async def run(target: Target) -> str:
        call = target.guard.stub.Classify(asked("hi"), metadata=metadata(target))
        return await outcome(call)

    ATTACKS[name] = run


def with_jwt(name: str, token: Callable[[], str]) -> None:
    with_metadata(name, lambda target: bearer(token()))


def fresh(**other: Any) -> str:
    """A token that was not used before: nothing else is wrong with it than what is told."""
    return signed(**({"jti": uuid4().hex} | other))


def now() -> int:
    return int(time.time())


with_metadata("no token", lambda target: ())
with_metadata("a wrong token", lambda target: bearer(target.acme[:-1] + "_"))
with_metadata("another scheme than bearer", lambda target: (("authorization", "Basic eDp5"),))
with_metadata("two tokens", lambda target: bearer(target.acme) + bearer(target.honest))
with_metadata("a token that has expired", lambda target: bearer(target.old))
with_metadata("a token of 9 KiB", lambda target: bearer("x" * 9 * 1024))
with_jwt("a JWT that has expired", lambda: fresh(exp=now() - 3600, iat=now() - 7200))
with_jwt("a JWT that is not yet valid", lambda: fresh(nbf=now() + 3600))
with_jwt("a JWT that is valid for years", lambda: fresh(exp=now() + 10**8))
with_jwt("a JWT for another audience", lambda: fresh(aud="another"))
with_jwt("a JWT of another issuer", lambda: fresh(iss="https://another.example"))
with_jwt("a JWT signed with another key", lambda: fresh(key=STRANGER))
with_jwt("a JWT with `alg` none", lambda: by_hand({"alg": "none"}, claims(jti=uuid4().hex)))
with_jwt(
    "a JWT with HS256 and the public key as its secret",
    lambda: by_hand({"alg": "HS256"}, claims(jti=uuid4().hex), PUBLIC_PEM),
)
with_jwt("a JWT for a subject without a tenant", lambda: fresh(sub="nobody"))
with_metadata("64 KiB of metadata", lambda target: (*bearer(target.acme), ("x", "y" * 65_536)))


@attack("a JWT for one call, used again")
async def _replayed(target: Target) -> str:
    token = bearer(fresh())
    assert await outcome(target.guard.stub.Classify(asked("hi"), metadata=token)) == "OK"
    return await outcome(target.guard.stub.Classify(asked("hi"), metadata=token))


@attack("another tenant's policy")
async def _anothers_policy(target: Target) -> str:
    request = asked("hi", policy="permissive")
    return await outcome(target.guard.stub.Classify(request, metadata=bearer(target.acme)))


@attack("a message of 8 MiB")
async def _oversized(target: Target) -> str:
    request = asked("x" * (8 * 2**20))
    return await outcome(target.guard.stub.Classify(request, metadata=bearer(target.acme)))


@attack("streams that begin and send nothing")
async def _slow(target: Target) -> str:
    return await _slow_streams(target, (start("hi"),))


@attack("streams that never begin")
async def _silent(target: Target) -> str:
    return await _slow_streams(target, ())


async def _slow_streams(target: Target, said: Sequence[Any]) -> str:
    async def one() -> str:
        call = target.guard.stub.ClassifyStream(metadata=bearer(target.acme))
        for step in said:
            await call.write(step)
        return await outcome(call.read())

    (end,) = set(await asyncio.gather(*(one() for _ in range(8))))
    return end


@attack("more streams than the tenant may have")
async def _many_streams(target: Target) -> str:
    return await _over(target, "ClassifyStream", 8)


async def _over(target: Target, rpc: str, most: int) -> str:
    """What the call after `most` that stay open gets."""
    stub = target.guard.stub
    async with AsyncExitStack() as stack:
        for _ in range(most):
            call = stub.ClassifyStream(metadata=bearer(target.acme))
            stack.callback(call.cancel)
            await call.write(start("hi"))
            await call.write(piece("a", check=True))
            await call.read()
        one_more = stub.ClassifyStream(iter([start("hi")]), metadata=bearer(target.acme))
        return await outcome(drained(one_more))


@attack("verdicts over the tenant's quota")
async def _many_verdicts(target: Target) -> str:
    who = bearer(target.acme)
    batch = guard_pb2.ClassifyBatchRequest(requests=[asked("hi")] * 50)
    for _ in range(4):
        await target.guard.stub.ClassifyBatch(batch, metadata=who)
    return await outcome(target.guard.stub.Classify(asked("hi"), metadata=who))


@attack("a batch larger than the tenant may send")
async def _large_batch(target: Target) -> str:
    batch = guard_pb2.ClassifyBatchRequest(requests=[asked("hi")] * 51)
    return await outcome(target.guard.stub.ClassifyBatch(batch, metadata=bearer(target.acme)))


@attack("more connections than `--max-connections`")
async def _many_connections(target: Target) -> str:
    ends = []
    async with AsyncExitStack() as stack:
        for _ in range(6):
            channel = await stack.enter_async_context(target.plain())
            stub: Any = guard_pb2_grpc.GuardServiceStub(channel)
            ends.append(await outcome(stub.Classify(asked("hi"), metadata=bearer(target.acme))))
    assert ends[0] == "OK"
    return ends[-1]


@attack("no client certificate, where a CA is set", tls=True)
async def _no_certificate(target: Target) -> str:
    return await _connected(target.secure(None), target)


@attack("a client certificate of another CA", tls=True)
async def _anothers_certificate(target: Target) -> str:
    return await _connected(target.secure(Authority("other").issue("acme")), target)


@attack("a client certificate that has expired", tls=True)
async def _expired_certificate(target: Target) -> str:
    day = timedelta(days=1)
    return await _connected(
        target.secure(target.ca.issue("acme", since=-3 * day, lasts=day)), target
    )


@attack("a client certificate of no tenant", tls=True)
async def _nobodys_certificate(target: Target) -> str:
    return await _connected(target.secure(target.ca.issue("nobody")), target, ())


@attack("no TLS, where TLS is on", tls=True)
async def _no_tls(target: Target) -> str:
    return await _connected(target.plain(), target)


async def _connected(channel: grpc.aio.Channel, target: Target, who: Metadata | None = None) -> str:
    async with channel:
        stub: Any = guard_pb2_grpc.GuardServiceStub(channel)
        metadata = bearer(target.acme) if who is None else who
        return await outcome(stub.Classify(asked("hi"), metadata=metadata))


@pytest.fixture
async def target(run_guard: RunGuard, tmp_path: Path, request: pytest.FixtureRequest) -> Target:
    """For an attack: by TLS or, mostly, without."""
    auth, ca = Auth(tmp_path), Authority()
    limits = {"streams": 8, "verdicts_per_s": 0.001, "burst": 200, "batch_items": 50}
    own = {"policies": ["default"], "limits": limits, "certificates": [{"cn": "acme"}]}
    acme, honest = auth.tenant("acme", **own), auth.tenant("honest")
    old = auth.tenant("old")
    auth.tenants["old"]["tokens"][0]["expires"] = "2020-01-01"
    auth.issuer()
    auth.issuers[0]["once"] = True
    knobs: dict[str, Any] = {"auth": auth.write(), "stream_idle_s": 0.3, "max_connections": 4}
    name = request.node.callspec.params["name"]
    if name in BY_TLS:
        ca.issue().write(tmp_path / "crt", tmp_path / "key")
        (tmp_path / "ca").write_bytes(ca.root)
        tls = {"tls_cert": tmp_path / "crt", "tls_key": tmp_path / "key"}
        knobs |= {"host": "127.0.0.1", "port": 0, "tls_client_ca": tmp_path / "ca", **tls}
    if name == "more streams than the tenant may have":
        knobs["stream_idle_s"] = 300.0
    return Target(await run_guard(**knobs), acme, honest, old, ca)


def told() -> dict[str, str]:
    """What the document says that attacks get."""
    text = SECURITY.read_text(encoding="utf-8").partition("## What attacks get")[2]
    return dict(ROW.findall(text.partition("\n## ")[0]))


def test_the_document_has_every_attack_and_no_other() -> None:
    assert list(told()) == list(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_gets_what_the_document_says_and_others_are_served(
    target: Target, name: str
) -> None:
    assert await ATTACKS[name](target) == told().get(name, "")
    channel = target.secure(target.ca.issue("acme")) if name in BY_TLS else target.plain()
    async with channel:
        stub: Any = guard_pb2_grpc.GuardServiceStub(channel)
        ready = bearer(target.honest)
        reply = await stub.Classify(asked("hi"), metadata=ready, timeout=20, wait_for_ready=True)
    assert reply.verdict.policy.name == "default"
