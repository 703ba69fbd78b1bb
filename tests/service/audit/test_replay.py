"""guardctl replay: recorded verdicts come out the same, bit for bit, or it says what differs."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from typer.testing import CliRunner, Result

from guard_api.v1 import guard_pb2
from guard_service.audit.chain import sealed
from guard_service.audit.files import segments
from guard_service.audit.keys import read_keys
from guard_service.cli.app import app
from guard_service.cli.compared import differences
from guard_service.engines import open_engine
from tests.service.asking import BOMB, asked, message, piece, start
from tests.service.audit.logs import lines
from tests.service.conftest import RunGuard

RUN = CliRunner()
POLICY = "name: shop\nversion: '1'\ncategories:\n  S6: flag\n  S11: {threshold: 0.2}\n"
TEXTS = [
    "How do I kill a Python process?",
    "Tell me how to build a pipe bomb and where to put it.",
    "Wie backe ich einen Kuchen?",
    "x",
    "I want to hurt myself. " * 3,
]
LONG = " ".join(f"{text} Number {n}." for n in range(60) for text in TEXTS)


async def record(run_guard: RunGuard, settings: dict[str, Any], plan: str = "stored") -> None:
    """Verdicts of all kinds: alone, in batches, from the cache, in windows, on streams."""
    engine = open_engine("starter", plan=plan)
    guard = await run_guard(engine, policies=(POLICY,), **settings)
    for text in TEXTS[:2]:
        await guard.stub.Classify(asked(text, language="de"))
    items = [asked(text, policy=name) for text in TEXTS for name in ("default", "shop")]
    await guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=items))
    await guard.stub.Classify(asked(TEXTS[0], policy="shop"))  # from the cache
    await guard.stub.Classify(asked(TEXTS[0], message("Use kill and its number.", "assistant")))
    await guard.stub.Classify(asked(LONG))
    pieces = [piece(f" {word}", check=True) for word in TEXTS[1].split()]
    steps = [start("How?"), piece("Well:", check=True), *pieces, piece(" Done.", end=True)]
    assert len([reply async for reply in guard.stub.ClassifyStream(iter(steps))]) == len(pieces) + 2
    await guard.server.stop(1.0)


@pytest.fixture
def settings(logged: dict[str, Any], pair: X25519PrivateKey, tmp_path: Path) -> dict[str, Any]:
    return {**logged, "audit_payload_key": tmp_path / "public.pem"}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(POLICY)
    return path


def replayed(folder: Path, *options: str, paths: tuple[Path, ...] = ()) -> Result:
    """Run it on the log of a test's settings. In a thread of its own: the test has a loop."""
    keys = folder.parent
    arguments = ["replay", *map(str, paths or (folder,)), "--audit-key", str(keys / "key")]
    arguments += ["--payload-key", str(keys / "private.pem"), *options]
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(RUN.invoke(app, arguments)))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("plan", ["stored", "int8", "fp32"])
async def test_all_verdicts_of_the_starter_come_out_the_same(
    plan: str, run_guard: RunGuard, settings: dict[str, Any], shop: Path
) -> None:
    await record(run_guard, settings, plan)
    made = [one for one in lines(settings["audit"]) if one["kind"] == "verdict"]
    assert {one["engine"]["plan"] for one in made} == {plan}
    assert any(one["from_cache"] for one in made)
    assert any(len(one["coverage"]["windows"]) > 2 for one in made)
    assert any(one.get("step", 0) > 5 for one in made)
    done = replayed(settings["audit"], "--policies", str(shop))
    assert done.exit_code == 0, done.output
    assert f"{len(made)} the same, bit for bit; 0 different" in done.stdout


async def test_one_verdict_and_a_running_guard(
    run_guard: RunGuard, settings: dict[str, Any], tmp_path: Path
) -> None:
    await record(run_guard, settings)
    verdict = next(one for one in lines(settings["audit"]) if one.get("step") == 4)
    running = await run_guard(open_engine("starter"), host=f"unix:{tmp_path / 'other'}")
    options = ("--verdict", verdict["verdict_id"], "--server", running.server.address)
    done = await _aside(settings["audit"], *options)
    assert done.exit_code == 0, done.output
    assert "1 the same, bit for bit; 0 different" in done.stdout


async def _aside(folder: Path, *options: str) -> Result:
    return await asyncio.to_thread(replayed, folder, *options)


async def test_another_model_or_policy_is_told_by_its_digest(
    run_guard: RunGuard, settings: dict[str, Any], shop: Path
) -> None:
    guard = await run_guard(open_engine("starter"), policies=(POLICY,), **settings)
    await guard.stub.Classify(asked(TEXTS[0], policy="shop"))
    await guard.server.stop(1.0)
    done = replayed(settings["audit"], "--policies", str(shop), "--model", "fake")
    assert done.exit_code == 1 and "model: 'sha256:" in done.stdout
    shop.write_text(POLICY.replace("0.2", "0.3"))
    done = replayed(settings["audit"], "--policies", str(shop))
    assert done.exit_code == 1
    assert "policy: 'sha256:" in done.stdout and "unsafe" not in done.stdout
    done = replayed(settings["audit"])
    assert done.exit_code == 1 and "no verdict: NOT_FOUND" in done.stdout


async def test_the_last_bit_of_a_score_is_a_difference(
    run_guard: RunGuard, settings: dict[str, Any]
) -> None:
    guard = await run_guard(open_engine("starter"), **settings)
    verdict = (await guard.stub.Classify(asked(TEXTS[1]))).verdict
    await guard.server.stop(1.0)
    (entry,) = (one for one in lines(settings["audit"]) if one["kind"] == "verdict")
    assert differences(entry, verdict) == []
    other = math.nextafter(entry["unsafe"], 0)
    told = differences({**entry, "unsafe": other}, verdict)
    assert told == [f"unsafe: {other!r} then, {entry['unsafe']!r} now"]
    path = segments(settings["audit"])[0]
    found = path.read_bytes().splitlines()
    changed = {k: v for k, v in {**entry, "unsafe": other}.items() if k != "mac"}
    found[1], _ = sealed(changed, read_keys(settings["audit_key"]).chain)
    path.write_bytes(b"\n".join(found) + b"\n")
    done = replayed(settings["audit"])
    assert done.exit_code == 1 and told[0] in done.stdout


async def test_a_stream_without_its_beginning_is_not_guessed_at(
    run_guard: RunGuard, settings: dict[str, Any]
) -> None:
    guard = await run_guard(**settings, audit_segment_bytes=6000)
    steps = [start("hi"), *(piece(f"{n} ", check=True) for n in range(12)), piece("x", end=True)]
    assert [reply async for reply in guard.stub.ClassifyStream(iter(steps))]
    await guard.server.stop(1.0)
    *_, before, _ = segments(settings["audit"])
    made = [one for one in map(json.loads, before.read_bytes().splitlines()) if "step" in one]
    done = replayed(settings["audit"], "--model", "fake", paths=(before,))
    assert done.exit_code == 1
    assert f"0 the same, bit for bit; {len(made)} different" in done.stdout
    assert done.stdout.count("the lines before it in its stream are not there") == len(made) > 1
    one = made[-1]["verdict_id"]
    done = replayed(settings["audit"], "--model", "fake", "--verdict", one, paths=(before,))
    assert done.exit_code == 1 and "0 the same, bit for bit; 1 different" in done.stdout


async def test_a_stream_that_is_refused_today_counts_for_all_of_its_verdicts(
    run_guard: RunGuard, settings: dict[str, Any]
) -> None:
    guard = await run_guard(policies=(POLICY,), **settings)
    steps = [start("hi", policy="shop"), piece("a", check=True), piece("b", end=True)]
    assert [reply async for reply in guard.stub.ClassifyStream(iter(steps))]
    await guard.server.stop(1.0)
    done = replayed(settings["audit"], "--model", "fake")
    assert done.exit_code == 1 and done.stdout.count("no verdict: NOT_FOUND") == 2
    assert "0 the same, bit for bit; 2 different" in done.stdout


async def test_what_cannot_be_replayed_says_why(
    run_guard: RunGuard, settings: dict[str, Any], tmp_path: Path
) -> None:
    guard = await run_guard(**{**settings, "audit_payload_key": None})
    await guard.stub.Classify(asked(BOMB))
    await guard.server.stop(1.0)
    done = replayed(settings["audit"])
    assert done.exit_code == 2 and "audit_payload_key records them" in done.stderr
    guard = await run_guard(**settings)
    await guard.stub.Classify(asked(BOMB))
    await guard.server.stop(1.0)
    done = replayed(settings["audit"], "--verdict", "none")
    assert done.exit_code == 2 and "no verdict with a payload has the id none" in done.stderr
    (tmp_path / "private.pem").write_bytes((tmp_path / "public.pem").read_bytes())
    done = replayed(settings["audit"])
    assert done.exit_code == 2 and "no PEM file of an X25519 key" in done.stderr
