"""Policies exchanged while the service runs: whole or not at all, and each call under those it
began with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard_api.v1 import guard_pb2
from guard_middleware.async_client import AsyncGuardClient
from guard_middleware.terms import Terms
from guard_middleware.verdict import Verdict
from guard_policies.assessment import Action
from guard_service.cli.app import app
from tests.service.asking import BOMB, Running, asked, fetched, piece, refused, start, until
from tests.service.conftest import RunGuard
from tests.service.test_moderation import Held

LENIENT = "name: shop\nversion: '1'\naction: allow\n"
STRICT = "name: shop\nversion: '2'\nthreshold: 0.01\n"
BROKEN = "name: shop\nversion: '3'\nthreshold: much\nactoin: block\n"
ALLOW, BLOCK = 1, 3


@dataclass
class Shop:
    """A guard that serves the policy files of a folder."""

    guard: Running
    folder: Path

    async def becomes(self, text: str, file: str = "shop.yaml") -> None:
        """The file has another text, and the server was told."""
        (self.folder / file).write_text(text)
        await self.guard.server.watcher.reload()

    async def version(self) -> str:
        """Of the policy that a verdict is by."""
        reply = await self.guard.stub.Classify(asked("hi", policy="shop"))
        return str(reply.verdict.policy.version)

    async def reloads(self) -> guard_pb2.Reloads:
        """What GetInfo tells."""
        info = await self.guard.stub.GetInfo(guard_pb2.GetInfoRequest())
        reloads: guard_pb2.Reloads = info.policy_reloads
        return reloads


@pytest.fixture
def opened(run_guard: RunGuard, tmp_path: Path) -> Callable[..., Awaitable[Shop]]:
    async def run(reload_s: float = 0.0, engine: Held | None = None) -> Shop:
        folder = tmp_path / "policies"
        folder.mkdir()
        (folder / "shop.yaml").write_text(LENIENT)
        knobs = {"reload_s": reload_s, "metrics": True, "metrics_port": 0}
        return Shop(await run_guard(engine, folders=(folder,), **knobs), folder)

    return run


@pytest.fixture
async def shop(opened: Callable[..., Awaitable[Shop]]) -> Shop:
    return await opened()


async def test_a_changed_policy_holds_for_the_next_call(shop: Shop) -> None:
    first = await shop.guard.stub.Classify(asked(BOMB, policy="shop"))
    await shop.becomes(STRICT)
    second = await shop.guard.stub.Classify(asked(BOMB, policy="shop"))
    assert (first.verdict.action, second.verdict.action) == (ALLOW, BLOCK)
    assert second.verdict.policy.version == "2"
    assert first.verdict.policy.digest != second.verdict.policy.digest


async def test_a_change_is_noticed_without_being_told(
    opened: Callable[..., Awaitable[Shop]],
) -> None:
    shop = await opened(reload_s=0.01)
    (shop.folder / "shop.yaml").write_text(STRICT)
    async with asyncio.timeout(20):
        while await shop.version() != "2":
            await asyncio.sleep(0.01)


async def test_one_broken_file_keeps_all_of_before_and_says_where(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    (shop.folder / "other.yaml").write_text("name: other\nversion: '1'\n")
    with caplog.at_level(logging.ERROR):
        await shop.becomes(BROKEN)
    assert await shop.version() == "1"
    assert (await refused(shop.guard.stub.Classify(asked("x", policy="other")))).reason == (
        "UNKNOWN_POLICY"
    )
    told = await shop.reloads()
    assert told.generation == 1 and told.HasField("failed_at")
    assert list(told.problems) == ["shop.yaml:3:12", "shop.yaml:4:1"]
    assert f"{shop.folder}/shop.yaml:3:12: " in caplog.text
    assert f"{shop.folder}/shop.yaml:4:1: " in caplog.text
    text = (await fetched(shop.guard, "/metrics"))[1]
    assert 'guard_policy_reloads_total{result="failed"} 1.0' in text
    assert "guard_policy_reload_failed 1.0" in text
    options = ["info", "--server", shop.guard.server.address]
    shown = (await asyncio.to_thread(CliRunner().invoke, app, options)).stdout
    told_places = "changed policies could not be loaded, see its log: shop.yaml:3:12, shop.yaml:4:1"
    assert told_places in " ".join(shown.split())


async def test_mended_files_end_the_failure(shop: Shop) -> None:
    before = await shop.reloads()
    await shop.becomes(BROKEN)
    await shop.becomes(STRICT)
    told = await shop.reloads()
    assert await shop.version() == "2" and told.generation == 2
    assert not told.HasField("failed_at") and not told.problems
    assert told.loaded_at.ToNanoseconds() > before.loaded_at.ToNanoseconds()
    text = (await fetched(shop.guard, "/metrics"))[1]
    assert 'guard_policy_reloads_total{result="ok"} 1.0' in text
    assert "guard_policy_reload_failed 0.0" in text
    infos = [line for line in text.splitlines() if line.startswith("guard_policy_info{")]
    assert len([line for line in infos if 'name="shop"' in line]) == 1
    assert len(infos) == len({line.split('name="')[1].split('"')[0] for line in infos})


async def test_going_back_to_what_is_used_ends_a_failure_too(shop: Shop) -> None:
    await shop.becomes(BROKEN)
    await shop.becomes(LENIENT)
    told = await shop.reloads()
    assert told.generation == 1 and not told.HasField("failed_at")


async def test_a_default_policy_that_is_gone_or_cannot_be_served_is_refused(
    run_guard: RunGuard, tmp_path: Path
) -> None:
    (tmp_path / "shop.yaml").write_text(LENIENT)
    guard = await run_guard(folders=(tmp_path,), default_policy="shop", reload_s=0.0)
    shop = Shop(guard, tmp_path)
    for unservable in ("name: another\nversion: '2'\n", f"{STRICT}engine: of-another-name\n"):
        await shop.becomes(unservable)
        reply = await guard.stub.Classify(asked("hi"))
        assert reply.verdict.policy.version == "1"
    assert list((await shop.reloads()).problems) == ["PolicyNotSupported"]


async def test_a_dropped_policy_is_unknown_and_a_folder_that_is_gone_drops_none(
    shop: Shop,
) -> None:
    await shop.becomes("name: other\nversion: '1'\n", "other.yaml")
    (shop.folder / "shop.yaml").unlink()
    await shop.guard.server.watcher.reload()
    refusal = await refused(shop.guard.stub.Classify(asked("x", policy="shop")))
    assert refusal.reason == "UNKNOWN_POLICY"
    shop.folder.rename(shop.folder.with_name("elsewhere"))
    await shop.guard.server.watcher.reload()
    assert (await shop.guard.stub.Classify(asked("x", policy="other"))).verdict.verdict_id
    assert list((await shop.reloads()).problems) == ["policies:1:1"]


async def test_a_stream_keeps_the_policy_it_began_with(shop: Shop) -> None:
    stream = shop.guard.stub.ClassifyStream()
    await stream.write(start("hi", policy="shop"))
    await stream.write(piece("so far", check=True))
    versions = [(await stream.read()).verdict.policy.version]
    await shop.becomes(STRICT)
    await stream.write(piece(BOMB, end=True))
    last = await stream.read()
    assert [*versions, last.verdict.policy.version] == ["1", "1"]
    assert last.final and last.verdict.action == ALLOW
    assert await shop.version() == "2"


async def test_a_batch_is_judged_under_the_policies_it_began_with(
    opened: Callable[..., Awaitable[Shop]],
) -> None:
    engine = Held()
    shop = await opened(engine=engine)
    engine.gate.clear()
    requests = [asked(f"item {n}", policy="shop") for n in range(4)]
    batch = shop.guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=requests))
    await until(lambda: shop.guard.server.batcher.queued_items + engine.saw("item") == 4)
    await shop.becomes(STRICT)
    after = shop.guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=requests))
    engine.gate.set()
    assert {one.verdict.policy.version for one in (await batch).results} == {"1"}
    assert {one.verdict.policy.version for one in (await after).results} == {"2"}


async def test_middleware_learns_what_changed_from_the_next_verdict(shop: Shop) -> None:
    declares = "on_unavailable: {}\n"
    await shop.becomes(LENIENT + declares.format("allow"))
    now = 0.0
    terms = Terms(timeout_s=20.0, on_unavailable="policy", clock=lambda: now)
    async with AsyncGuardClient(shop.guard.server.address, terms) as client:
        await client.classify("hi", policy="shop")
        await shop.becomes(STRICT + declares.format("flag"))
        for _ in range(2):  # the first tells of another policy, and the second asks for it
            now += 10.0
            outcome = await client.classify("hi", policy="shop")
            assert isinstance(outcome, Verdict)
            client.saw(outcome.policy)  # as middleware does
        await shop.guard.server.stop(0.0)
        last = await client.classify("hi", policy="shop")
    assert not last.judged and last.action is Action.FLAG
