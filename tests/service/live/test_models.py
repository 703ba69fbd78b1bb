"""Models exchanged while the service runs: checked first, in one step, the old one seen off."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from guard_api.v1 import guard_pb2
from guard_service.engines import open_engine
from guard_service.live import models
from guard_service.live.memory import NoRoom, check_room
from tests.service.asking import BOMB, PATIENCE_S, Running, asked, fetched, piece, start, until
from tests.service.conftest import RunGuard
from tests.service.live.store import Model, Store
from tests.service.tiny_artifact import tiny_artifact, tiny_weights

TIERED = "name: tiered\nversion: '1'\ncascade: {band: [0, 1]}\n"


@dataclass
class Served:
    """A server of a store's models."""

    store: Store
    guard: Running

    async def becomes(self, text: str, link: str = "first") -> None:
        self.store.has(text, link)
        await self.guard.server.watcher.reload()

    async def name(self, policy: str = "") -> str:
        """Of the model that judges a call, whose digest must be its own."""
        request = asked("hi", policy=policy, no_cache=True)
        return name_of((await self.guard.stub.Classify(request)).verdict, self.store)

    async def reloads(self) -> guard_pb2.Reloads:
        info = await self.guard.stub.GetInfo(guard_pb2.GetInfoRequest())
        reloads: guard_pb2.Reloads = info.model_reloads
        return reloads


def name_of(verdict: Any, store: Store) -> str:
    cards = {one.card.digest: one.card.name for one in store.opened}
    assert cards[verdict.model.digest] == verdict.model.name
    return str(verdict.model.name)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "models").mkdir()
    store = Store(tmp_path / "models")
    store.has("old")
    return store


@pytest.fixture
async def served(store: Store, run_guard: RunGuard) -> Served:
    knobs = {"metrics": True, "metrics_port": 0, "reload_s": 0.0}
    engine = store.open(store.path(), "auto")
    return Served(
        store, await run_guard(engine, model=store.path(), open_model=store.open, **knobs)
    )


async def test_a_new_model_judges_the_next_call_and_the_old_one_is_closed(served: Served) -> None:
    assert await served.name() == "old"
    await served.becomes("new")
    assert await served.name() == "new"
    old, new = served.store.opened
    await until(lambda: old.closed)
    assert not new.closed
    told = await served.reloads()
    assert told.generation == 2 and not told.HasField("failed_at")
    text = (await fetched(served.guard, "/metrics"))[1]
    assert 'guard_model_reloads_total{result="ok"} 1.0' in text
    assert "guard_models_draining 0.0" in text
    infos = [line for line in text.splitlines() if line.startswith("guard_model_info{")]
    assert len(infos) == 1 and new.card.digest in infos[0]
    info = await served.guard.stub.GetInfo(guard_pb2.GetInfoRequest())
    assert [one.model.digest for one in info.models] == [new.card.digest]


async def test_a_change_is_noticed_without_being_told(store: Store, run_guard: RunGuard) -> None:
    engine = store.open(store.path(), "auto")
    guard = await run_guard(engine, model=store.path(), open_model=store.open, reload_s=0.01)
    store.has("new")
    served = Served(store, guard)
    async with asyncio.timeout(PATIENCE_S):
        while await served.name() != "new":
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("broken", "EngineFailed"),
        ("strange", "EngineFailed"),
        ("narrow", "PolicyNotSupported"),
    ],
)
async def test_a_model_that_fails_is_left_out_and_told(
    served: Served, text: str, problem: str
) -> None:
    await served.becomes(text)
    assert await served.name() == "old"
    old, *others = served.store.opened
    assert not old.closed and all(one.closed for one in others)
    told = await served.reloads()
    assert told.generation == 1 and list(told.problems) == [problem]
    shown = (await fetched(served.guard, "/metrics"))[1]
    assert "guard_model_reload_failed 1.0" in shown
    await served.becomes("new")
    assert await served.name() == "new"
    assert not (await served.reloads()).HasField("failed_at")


async def test_what_has_not_changed_is_not_loaded_again(served: Served) -> None:
    await served.guard.server.watcher.reload()
    assert len(served.store.opened) == 1 and (await served.reloads()).generation == 1


async def test_calls_and_streams_end_on_the_model_they_began_with(served: Served) -> None:
    stub, store = served.guard.stub, served.store
    stream = stub.ClassifyStream()
    await stream.write(start("hi"))
    await stream.write(piece("so far", check=True))
    names = [name_of((await stream.read()).verdict, store)]
    old = store.opened[0]
    old.gate.clear()
    requests = [asked(f"item {n}") for n in range(3)]
    batch = stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=requests))
    await until(lambda: served.guard.server.batcher.queued_items > 0 or bool(old.batches[3:]))
    await served.becomes("new")
    assert await served.name() == "new"
    assert not old.closed
    assert "guard_models_draining 1.0" in (await fetched(served.guard, "/metrics"))[1]
    old.gate.set()
    assert {name_of(one.verdict, store) for one in (await batch).results} == {"old"}
    await stream.write(piece(BOMB, end=True))
    names.append(name_of((await stream.read()).verdict, store))
    assert names == ["old", "old"] and not old.closed
    assert await stream.read() is grpc.aio.EOF
    await until(lambda: old.closed)


def engine_threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("guard-engine")}


@pytest.fixture
def of_others() -> set[threading.Thread]:
    """Threads of engines that other tests have left running."""
    return engine_threads()


async def test_a_server_that_ends_closes_models_that_are_leaving(
    of_others: set[threading.Thread], served: Served
) -> None:
    assert engine_threads() - of_others
    stream = served.guard.stub.ClassifyStream()
    await stream.write(start("hi"))
    await stream.write(piece("so far", check=True))
    await stream.read()
    await served.becomes("new")
    await served.guard.server.stop(0.0)
    with suppress(grpc.aio.AioRpcError):
        await stream.read()
    assert not engine_threads() - of_others


async def test_a_model_that_is_loaded_when_the_server_ends_is_closed(served: Served) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        loading.set()
        go_on.wait(PATIENCE_S)

    served.store.opening = slowly
    served.store.has("new")
    served.guard.server.watcher.now()
    await until(loading.is_set)
    await served.guard.server.stop(0.0)
    go_on.set()
    await until(lambda: len(served.store.opened) == 2 and served.store.opened[1].closed)


async def test_the_two_models_of_a_cascade_are_exchanged_each_by_itself(
    store: Store, run_guard: RunGuard
) -> None:
    store.has("large", "second")
    first, second = (store.open(store.path(link), "auto") for link in ("first", "second"))
    guard = await run_guard(
        first,
        (TIERED,),
        second,
        model=store.path(),
        second_model=store.path("second"),
        open_model=store.open,
        reload_s=0.0,
    )
    served = Served(store, guard)
    assert [await served.name(), await served.name("tiered")] == ["old", "large"]
    await served.becomes("larger", "second")
    assert [await served.name(), await served.name("tiered")] == ["old", "larger"]
    await until(lambda: store.opened[1].closed)
    await served.becomes("new")
    assert [await served.name(), await served.name("tiered")] == ["new", "larger"]
    await until(lambda: store.opened[0].closed)
    store.has("newest")
    await served.becomes("broken", "second")
    assert [await served.name(), await served.name("tiered")] == ["new", "larger"]
    assert [one.closed for one in store.opened] == [True, True, False, False, True]


async def test_a_hanging_model_can_be_exchanged(store: Store, run_guard: RunGuard) -> None:
    old = Model("old")
    store.opened.append(old)
    guard = await run_guard(
        old, model=store.path(), open_model=store.open, reload_s=0.0, engine_timeout_s=0.2
    )
    old.gate.clear()
    hanging = guard.stub.Classify(asked("hi"))
    with pytest.raises(grpc.aio.AioRpcError, match="does not answer"):
        await hanging
    served = Served(store, guard)
    await served.becomes("new")
    assert await served.name() == "new"
    old.gate.set()


def test_memory_is_asked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "model.data", "wb") as file:
        file.truncate(100 * 2**20)
    (tmp_path / "guard.json").touch()
    check_room(tmp_path, "stored", "stored", 151 * 2**20)
    with pytest.raises(NoRoom, match="may take 350 MiB to load and 151 MiB are free"):
        check_room(tmp_path, "int8", "stored", 151 * 2**20)


def test_a_checkpoint_beside_one_on_a_gpu_needs_room_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(100 * 2**20)
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        mem_get_info=lambda: (80 * 2**20, 1000 * 2**20),
        memory_reserved=lambda: 50 * 2**20,
        memory_allocated=lambda: 30 * 2**20,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    check_room(tmp_path, "", "int8", 0)
    with pytest.raises(NoRoom, match="may take 114 MiB to load and 100 MiB are free"):
        check_room(tmp_path, "", "stored", 2**40)


async def test_without_room_nothing_is_loaded(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        models, "check_room", lambda folder, plan, weights: check_room(folder, plan, weights, 0)
    )
    with caplog.at_level(logging.ERROR):
        await served.becomes("new")
    assert list((await served.reloads()).problems) == ["NoRoom"]
    assert len(served.store.opened) == 1 and "give the service more memory" in caplog.text


async def test_real_artifacts_are_exchanged_and_the_old_one_is_let_go(
    run_guard: RunGuard, tmp_path: Path
) -> None:
    made = [tiny_artifact(tmp_path / f"v{n}", weights=tiny_weights(n)) for n in range(2)]
    link = tmp_path / "current"
    link.symlink_to("v0")
    guard = await run_guard(open_engine(link), model=str(link), reload_s=0.0)
    session = weakref.ref(guard.server._live.guards.first)
    before = (await guard.stub.Classify(asked("hi"))).verdict
    (tmp_path / "draft").symlink_to("v1")
    (tmp_path / "draft").rename(link)
    await guard.server.watcher.reload()
    after = (await guard.stub.Classify(asked("hi"))).verdict
    assert [one.model.digest for one in (before, after)] == [one.digest for one in made]
    assert before.unsafe_score != after.unsafe_score and not after.from_cache
    del guard.engine
    await until(lambda: session() is None)
