"""Policies and models are exchanged some tens of times while calls of all kinds run: none fails,
and every verdict is by one policy and one model, those that it names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard_api.v1 import guard_pb2
from guard_policies.loader import parse_policy
from tests.service.asking import Running, asked, piece, start, until
from tests.service.conftest import RunGuard
from tests.service.live.store import Model, Store

EXCHANGES = 24  # of the policies; of the model at every other one
BETWEEN = 12  # verdicts, at least
NAMES = ("shop", "other")
BLOCK, ALLOW = 3, 1


def policy(name: str, version: int) -> str:
    return f"name: {name}\nversion: '{version}'\nthreshold: {threshold(version)}\n"


def threshold(version: int) -> float:
    return 0.05 + version % 17 * 0.05


@dataclass
class Load:
    """Callers, and what they were told. Each looks at what belongs together."""

    guard: Running
    store: Store
    ends: bool = False
    verdicts: int = 0
    mixed: list[str] = field(default_factory=list)
    by_policy: Counter[str] = field(default_factory=Counter)
    by_model: Counter[str] = field(default_factory=Counter)

    def seen(self, *verdicts: Any) -> None:
        """Verdicts of one call."""
        self.verdicts += len(verdicts)
        made = {(v.policy.version, v.model.digest) for v in verdicts}
        if len(made) > 1:
            self.mixed.append(f"one call: {made}")
        for verdict in verdicts:
            ref = verdict.policy
            self.by_policy[ref.version] += 1
            self.by_model[verdict.model.digest] += 1
            if ref.digest != parse_policy(policy(ref.name, int(ref.version))).digest:
                self.mixed.append(f"policy {ref}")
            score = self.model(verdict.model.digest).score
            if abs(verdict.unsafe_score - score) > 1e-6:
                self.mixed.append(f"another model than {verdict.model} scored")
            blocks = score >= threshold(int(ref.version))
            if verdict.action != (BLOCK if blocks else ALLOW):
                self.mixed.append(f"another policy than {ref} decided")

    async def more(self, verdicts: int, callers: Sequence[asyncio.Task[None]]) -> None:
        """Until there are that many more, or a caller failed."""
        wanted = self.verdicts + verdicts
        await until(lambda: self.verdicts >= wanted or any(one.done() for one in callers))

    def model(self, digest: str) -> Model:
        (found,) = (one for one in self.store.opened if one.card.digest == digest)
        return found

    async def single(self, caller: int) -> None:
        number = 0
        while not self.ends:
            request = asked(f"{caller} {number % 7}", policy=NAMES[number % 2])
            self.seen((await self.guard.stub.Classify(request)).verdict)
            number += 1

    async def batch(self, caller: int) -> None:
        while not self.ends:
            requests = [asked(f"{caller} {n}", policy=NAMES[n % 2]) for n in range(4)]
            reply = await self.guard.stub.ClassifyBatch(
                guard_pb2.ClassifyBatchRequest(requests=requests)
            )
            assert not [one for one in reply.results if one.HasField("error")]
            self.seen(*(one.verdict for one in reply.results))

    async def stream(self, caller: int) -> None:
        while not self.ends:
            stream = self.guard.stub.ClassifyStream()
            await stream.write(start("hi", policy=NAMES[caller % 2]))
            verdicts = []
            for number in range(4):
                await stream.write(piece(f"{caller} {number}", check=True, end=number == 3))
                verdicts.append((await stream.read()).verdict)
            self.seen(*verdicts)


async def test_exchanges_under_load_fail_no_call_and_mix_no_verdict(
    run_guard: RunGuard, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    store = Store(tmp_path / "models")
    store.has("model 0")
    set_policies(tmp_path, 0)
    guard = await run_guard(
        store.open(store.path(), "auto"),
        folders=(tmp_path / "policies",),
        model=store.path(),
        open_model=store.open,
        reload_s=0.0,
    )
    load = Load(guard, store)
    kinds = (load.single, load.batch, load.stream) * 2
    callers = [asyncio.create_task(kind(number)) for number, kind in enumerate(kinds)]
    for version in range(1, EXCHANGES + 1):
        await load.more(BETWEEN, callers)
        set_policies(tmp_path, version)
        if version % 2:
            store.has(f"model {version}")
        await guard.server.watcher.reload()
    load.ends = True
    await asyncio.gather(*callers)
    info = await guard.stub.GetInfo(guard_pb2.GetInfoRequest())
    assert not load.mixed, load.mixed[:5]
    assert info.policy_reloads.generation == EXCHANGES + 1
    assert info.model_reloads.generation == EXCHANGES // 2 + 1 == len(store.opened)
    assert len(load.by_policy) > EXCHANGES // 2 and len(load.by_model) > EXCHANGES // 4
    *old, last = store.opened
    await until(lambda: all(one.closed for one in old))
    assert not last.closed


def set_policies(folder: Path, version: int) -> None:
    """Both files in one step, as Kubernetes changes a ConfigMap."""
    made = folder / f"policies-{version}"
    made.mkdir()
    for name in NAMES:
        (made / f"{name}.yaml").write_text(policy(name, version))
    (folder / "draft").symlink_to(made.name)
    (folder / "draft").rename(folder / "policies")
