"""Tenants on a running server: their policies, quotas, caches, and what others see of them."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_service.logs import JsonFormatter
from tests.service.asking import BOMB, Running, asked, fetched, piece, refusal_of, refused, start
from tests.service.conftest import RunGuard
from tests.service.security.callers import Auth, Metadata, bearer
from tests.service.security.issuing import Authority, secure_channel

SECRET = "the-tenants-own-words"


@pytest.fixture
def auth(tmp_path: Path) -> Auth:
    return Auth(tmp_path)


async def names(guard: Running, who: Metadata) -> tuple[list[str], str]:
    reply = await guard.stub.ListPolicies(guard_pb2.ListPoliciesRequest(), metadata=who)
    return [one.policy.name for one in reply.policies], reply.default_policy


def sample(guard: Running, name: str, **labels: str) -> float:
    found = guard.server.registry.get_sample_value(name, labels)
    return found if found is not None else 0.0


async def test_each_tenant_has_its_own_policies(run_guard: RunGuard, auth: Auth) -> None:
    acme = bearer(auth.tenant("acme", policies=["strict"], default_policy="strict"))
    beta = bearer(auth.tenant("beta"))
    guard = await run_guard(auth=auth.write())
    assert await names(guard, acme) == (["strict"], "strict")
    assert await names(guard, beta) == (["default", "permissive", "strict"], "default")
    verdict = (await guard.stub.Classify(asked("hi"), metadata=acme)).verdict
    assert verdict.policy.name == "strict"


async def test_another_tenants_policy_is_as_one_that_is_not_there(
    run_guard: RunGuard, auth: Auth
) -> None:
    acme = bearer(auth.tenant("acme", policies=["strict"], default_policy="strict"))
    auth.tenant("beta", policies=["default", "permissive"])
    guard = await run_guard(auth=auth.write())
    told = []
    for name in ("permissive", "no-such-policy"):
        request = asked("hi", policy=name)
        refusal = await refused(guard.stub.Classify(request, metadata=acme))
        refusal.metadata.pop("request_id")
        batch = guard_pb2.ClassifyBatchRequest(requests=[request])
        (item,) = (await guard.stub.ClassifyBatch(batch, metadata=acme)).results
        stream = guard.stub.ClassifyStream(iter([start("hi", policy=name)]), metadata=acme)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        cut = refusal_of(caught.value)
        told.append((refusal, item.error.SerializeToString(), cut.code, cut.message, cut.reason))
    assert told[0] == told[1]
    assert told[0][0].code is grpc.StatusCode.NOT_FOUND


async def test_a_header_does_not_choose_the_tenant(run_guard: RunGuard, auth: Auth) -> None:
    acme = bearer(auth.tenant("acme", policies=["strict"], default_policy="strict"))
    auth.tenant("beta")
    guard = await run_guard(auth=auth.write())
    for header in ("x-tenant", "tenant", "x-guard-tenant"):
        assert await names(guard, (*acme, (header, "beta"))) == (["strict"], "strict")


async def test_a_certificate_says_who_calls(run_guard: RunGuard, auth: Auth) -> None:
    ca, folder = Authority(), auth.folder
    ca.issue().write(folder / "c", folder / "k")
    (folder / "ca").write_bytes(ca.root)
    acme = {"uri": "spiffe://cluster/ns/llm/sa/backend"}
    auth.tenant("acme", certificates=[acme], policies=["strict"], default_policy="strict")
    beta = bearer(auth.tenant("beta", certificates=[{"cn": "beta"}]))
    tls = {"tls_cert": folder / "c", "tls_key": folder / "k", "tls_client_ca": folder / "ca"}
    guard = await run_guard(auth=auth.write(), host="127.0.0.1", port=0, **tls)

    async def meets(name: str, *others: x509.GeneralName, who: Metadata = ()) -> Any:
        own = ca.issue(name, *others)
        async with secure_channel(guard.server.address, ca.root, own) as channel:
            stub: Any = guard_pb2_grpc.GuardServiceStub(channel)
            try:
                reply = await stub.ListPolicies(guard_pb2.ListPoliciesRequest(), metadata=who)
                return reply.default_policy
            except grpc.aio.AioRpcError as error:
                return refusal_of(error).reason

    assert await meets("x", x509.UniformResourceIdentifier(acme["uri"])) == "strict"
    assert await meets("beta") == "default"
    assert await meets("stranger") == "NO_TENANT"
    assert await meets("beta", x509.UniformResourceIdentifier(acme["uri"])) == "NO_TENANT"
    # A token counts before a certificate, and a wrong one is not made good by it.
    assert await meets("x", x509.UniformResourceIdentifier(acme["uri"]), who=beta) == "default"
    assert await meets("beta", who=bearer("x" * 40)) == "INVALID_CREDENTIALS"


async def test_quotas_are_refused_with_the_time_to_come_back(
    run_guard: RunGuard, auth: Auth
) -> None:
    limits = {"verdicts_per_s": 0.01, "burst": 2, "batch_items": 3}
    acme = bearer(auth.tenant("acme", limits=limits))
    beta = bearer(auth.tenant("beta", limits={"characters_per_minute": 100}))
    guard = await run_guard(auth=auth.write())
    for _ in range(2):
        await guard.stub.Classify(asked("hi"), metadata=acme)
    refusal = await refused(guard.stub.Classify(asked("hi"), metadata=acme))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    assert refusal.retry_s and 50 < refusal.retry_s <= 100
    batch = guard_pb2.ClassifyBatchRequest(requests=[asked("hi")] * 3)
    items = (await guard.stub.ClassifyBatch(batch, metadata=acme)).results
    assert {item.error.code for item in items} == {grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
    batch.requests.append(asked("hi"))
    refusal = await refused(guard.stub.ClassifyBatch(batch, metadata=acme))
    assert refusal.reason == "BATCH_TOO_LARGE"
    info = await guard.stub.GetInfo(guard_pb2.GetInfoRequest(), metadata=acme)
    assert info.limits.max_batch_items == 3
    await guard.stub.Classify(asked("x" * 90), metadata=beta)
    refusal = await refused(guard.stub.Classify(asked("x" * 90), metadata=beta))
    assert refusal.reason == "QUOTA_EXCEEDED" and refusal.retry_s
    name = "guard_tenant_refused_total"
    assert sample(guard, name, tenant="acme", quota="verdicts") == 4
    assert sample(guard, name, tenant="beta", quota="characters") == 1


async def test_a_growing_reply_waits_for_its_quota_and_is_charged_once(
    run_guard: RunGuard, auth: Auth
) -> None:
    limits = {"characters_per_minute": 600, "verdicts_per_s": 20, "burst": 1}
    acme = bearer(auth.tenant("acme", limits=limits))
    guard = await run_guard(auth=auth.write())
    text = "y" * 50

    async def steps() -> Any:
        yield start("hi")
        for _ in range(9):
            yield piece(text, check=True)
        yield piece(text, end=True)

    final = False
    async for reply in guard.stub.ClassifyStream(steps(), metadata=acme):
        final = reply.final
    # 502 of 600 characters, though every check read the reply from its beginning; and more than
    # one verdict in a twentieth of a second, which was waited for.
    assert final


async def test_calls_and_streams_in_progress_are_bounded_by_tenant(
    run_guard: RunGuard, auth: Auth
) -> None:
    acme = bearer(auth.tenant("acme", limits={"streams": 1, "calls": 2}))
    beta = bearer(auth.tenant("beta"))
    guard = await run_guard(auth=auth.write())
    open_ = guard.stub.ClassifyStream(metadata=acme)
    await open_.write(start("hi"))
    await open_.write(piece("a", check=True))
    await open_.read()
    assert sample(guard, "guard_tenant_in_flight", tenant="acme") == 1
    second = guard.stub.ClassifyStream(metadata=acme)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await second.read()
    assert refusal_of(caught.value).reason == "QUOTA_EXCEEDED"
    await guard.stub.Classify(asked("hi"), metadata=acme)
    other = guard.stub.ClassifyStream(metadata=beta)
    await other.write(start("hi"))
    await other.write(piece("a", end=True))
    assert (await other.read()).final
    await open_.write(piece("b", end=True))
    assert (await open_.read()).final
    assert await open_.code() is grpc.StatusCode.OK
    third = guard.stub.ClassifyStream(iter([start("hi"), piece("a", end=True)]), metadata=acme)
    assert [reply.final async for reply in third] == [True]


async def test_one_tenant_does_not_fill_the_service(run_guard: RunGuard, auth: Auth) -> None:
    acme, beta = bearer(auth.tenant("acme")), bearer(auth.tenant("beta"))
    guard = await run_guard(auth=auth.write(), max_calls=4)
    streams = [guard.stub.ClassifyStream(metadata=acme) for _ in range(2)]
    for stream in streams:
        await stream.write(start("hi"))
        await stream.write(piece("a", check=True))
        await stream.read()
    refusal = await refused(guard.stub.Classify(asked("hi"), metadata=acme))
    assert (refusal.reason, refusal.retry_s) == ("QUOTA_EXCEEDED", 0.25)
    assert (await guard.stub.Classify(asked("hi"), metadata=beta)).verdict


async def test_no_tenant_learns_what_another_asked(run_guard: RunGuard, auth: Auth) -> None:
    acme, beta = bearer(auth.tenant("acme")), bearer(auth.tenant("beta"))
    guard = await run_guard(auth=auth.write())

    async def cached(who: Metadata) -> bool:
        return bool((await guard.stub.Classify(asked(SECRET), metadata=who)).verdict.from_cache)

    assert [await cached(acme), await cached(acme)] == [False, True]
    assert [await cached(beta), await cached(beta)] == [False, True]
    runs = sample(guard, "guard_verdict_cache_total", result="miss")
    assert runs == 2


async def test_identical_questions_at_once_are_joined_within_a_tenant_only(
    run_guard: RunGuard, auth: Auth
) -> None:
    acme, beta = bearer(auth.tenant("acme")), bearer(auth.tenant("beta"))
    guard = await run_guard(auth=auth.write())
    calls = [guard.stub.Classify(asked(BOMB), metadata=who) for who in (acme, beta) * 4]
    verdicts = [(await call).verdict for call in calls]
    for own in (verdicts[0::2], verdicts[1::2]):
        assert sum(not verdict.from_cache for verdict in own) == 1


async def test_tenants_are_told_in_metrics_and_logs_and_secrets_are_not(
    run_guard: RunGuard, auth: Auth, caplog: pytest.LogCaptureFixture
) -> None:
    token = auth.tenant("acme")
    guard = await run_guard(auth=auth.write(), metrics=True, metrics_port=0)
    with caplog.at_level(logging.DEBUG):
        await guard.stub.Classify(asked(SECRET), metadata=bearer(token))
        await refused(guard.stub.Classify(asked(SECRET), metadata=bearer(token + "x")))
        await refused(guard.stub.Classify(asked(SECRET)))
    lines = [JsonFormatter().format(record) for record in caplog.records]
    access = [json.loads(line) for line in lines if '"guard_service.access"' in line]
    assert [(one.get("tenant"), one.get("caller"), one["code"]) for one in access] == [
        ("acme", "acme-job", "OK"),
        (None, None, "UNAUTHENTICATED"),
        (None, None, "UNAUTHENTICATED"),
    ]
    _, shown = await fetched(guard, "/metrics")
    assert 'guard_tenant_requests_total{code="OK",tenant="acme"} 1.0' in shown
    assert 'guard_credentials_refused_total{reason="INVALID_CREDENTIALS"} 1.0' in shown
    for text in (shown, *lines):
        assert token not in text and SECRET not in text


async def test_a_new_auth_file_counts_at_once_and_a_broken_one_does_not(
    run_guard: RunGuard, auth: Auth, caplog: pytest.LogCaptureFixture
) -> None:
    acme = bearer(auth.tenant("acme", limits={"verdicts_per_s": 0.001, "burst": 1}))
    guard = await run_guard(auth=auth.write(), reload_s=0)
    await guard.stub.Classify(asked("hi"), metadata=acme)
    beta = bearer(auth.tenant("beta"))
    auth.write()
    await guard.server.watcher.reload("auth")
    assert (await names(guard, beta))[1] == "default"
    # What acme used stays used.
    assert (await refused(guard.stub.Classify(asked("hi"), metadata=acme))).reason == (
        "QUOTA_EXCEEDED"
    )
    auth.path.write_text(auth.path.read_text()[:-30] + "[", encoding="utf-8")
    with caplog.at_level(logging.ERROR):
        await guard.server.watcher.reload("auth")
    assert "stays in use" in caplog.text
    labels = {"what": "auth", "result": "failed"}
    assert sample(guard, "guard_security_reloads_total", **labels) == 1
    assert (await names(guard, beta))[1] == "default"
    del auth.tenants["acme"]
    auth.write()
    await guard.server.watcher.reload("auth")
    assert (await refused(guard.stub.Classify(asked("hi"), metadata=acme))).reason == (
        "INVALID_CREDENTIALS"
    )


async def test_probes_and_reflection_need_no_credentials_and_metrics_do_where_told(
    run_guard: RunGuard, auth: Auth
) -> None:
    auth.tenant("acme")
    scraper = auth.tenant("scraper")
    auth.metrics = {"tokens": auth.tenants.pop("scraper")["tokens"]}
    guard = await run_guard(auth=auth.write(), metrics=True, metrics_port=0, reflection=False)
    health = health_pb2_grpc.HealthStub(guard.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
    assert (await fetched(guard, "/readyz"))[0] == (await fetched(guard, "/livez"))[0] == 200
    assert (await fetched(guard, "/metrics"))[0] == 401
    assert (await fetched(guard, "/metrics", bearer("x" * 40)))[0] == 401
    assert (await fetched(guard, "/metrics", bearer(scraper)))[0] == 200
    # Who may scrape may not ask.
    refusal = await refused(guard.stub.Classify(asked("hi"), metadata=bearer(scraper)))
    assert refusal.reason == "INVALID_CREDENTIALS"
    stub = reflection_pb2_grpc.ServerReflectionStub(guard.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.ServerReflectionInfo(iter([ask])):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_without_an_auth_file_all_is_as_it_was(guard: Running) -> None:
    assert (await guard.stub.Classify(asked("hi"))).verdict
    assert (await guard.stub.Classify(asked("hi"), metadata=bearer("whatever"))).verdict
    assert await asyncio.wait_for(names(guard, ()), 20)
