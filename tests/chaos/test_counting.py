"""What the chaos run counts: each thing that must not happen is found when it does."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import grpc.aio
import pytest

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2
from guard_service.config import Settings
from guard_service.local import local_server
from tests.chaos import report
from tests.chaos.calls import Caller, Guard
from tests.chaos.chats import Client, Door
from tests.chaos.journal import Arrived, Journals, Judged, Writer, case_of, now
from tests.chaos.ledger import Faults, Ledger
from tests.chaos.processes import Held, Process
from tests.chaos.script import HEADER, Script
from tests.chaos.truth import Policies, action_of
from tests.chaos.upstream import Upstream
from tests.middleware.asgi_calls import listening

VERDICT = Judged(1.0, 7, 0, "allow", "p", "1", "d1", "m")
KNOWN = [("p", "1", "d1")]


def wrongs(journals: Journals, **received: int) -> dict[str, int]:
    ledger = Ledger(received={int(case.removeprefix("case")): n for case, n in received.items()})
    ledger.settle(journals, KNOWN)
    return {str(name): count for name, count in ledger.wrongs.items()}


def test_what_a_verdict_allowed_before_is_screened() -> None:
    reply = replace(VERDICT, chars=40)
    assert wrongs(Journals([VERDICT, reply], [Arrived(1.5, 7)]), case7=40) == {}


@pytest.mark.parametrize(
    "verdicts",
    [
        [],
        [replace(VERDICT, at=2.0)],  # too late
        [replace(VERDICT, action="block")],
        [replace(VERDICT, case=8)],
        [replace(VERDICT, chars=40)],  # of the reply, not of the prompt
    ],
)
def test_request_that_arrives_before_its_verdict_is_unscreened(verdicts: list[Judged]) -> None:
    assert wrongs(Journals(verdicts, [Arrived(1.5, 7)])) == {"unscreened": 1}


def test_reply_beyond_what_verdicts_cover_is_unscreened() -> None:
    said = [replace(VERDICT, chars=40), replace(VERDICT, chars=80, action="block")]
    assert wrongs(Journals(said, []), case7=41) == {"unscreened": 1}


def test_version_of_a_policy_with_the_digest_of_another_is_mixed() -> None:
    assert wrongs(Journals([replace(VERDICT, version="2")], [])) == {"mixed": 1}


def test_journals_are_read_as_they_were_written(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "judged")
    writer.write(VERDICT)
    read = Journals.read([tmp_path / "judged", tmp_path / "none"], [])
    assert read.judged == (VERDICT,) and read.arrived == ()


def test_faults_explain_what_overlaps_them_and_nothing_else() -> None:
    faults = Faults(grace_s=0.0)
    before = now()
    faults.begin("a")
    assert faults.explain(("a", "b"), now()) and not faults.explain(("b",), before)
    assert not faults.explain_all(("a", "b"), before)
    faults.begin("b")
    assert faults.explain_all(("a", "b"), before)
    faults.end("a")
    assert faults.explain(("a",), before) and not faults.explain(("a",), now())


def test_process_that_grew_is_told_and_one_that_began_anew_is_not(tmp_path: Path) -> None:
    async def ready() -> bool:
        return True

    process = Process("p", "m", (), tmp_path, ready, starts=1)
    process.samples = {report.WARM: Held(100, 10, 5, 2), report.END: Held(120, 12, 5, 3)}
    assert report.grown(process) == ""
    process.samples[report.END] = Held(200, 12, 5, 3)
    assert "200 at the end" in report.grown(process)
    process.samples[report.END] = Held(100, 10, 5, 200)
    assert "200 at the end" in report.grown(process)
    process.starts = 2
    assert report.grown(process) == ""


@asynccontextmanager
async def client(folder: Path) -> AsyncIterator[tuple[Client, Ledger, Door]]:
    """A client of an upstream that nobody guards."""
    ledger = Ledger()
    upstream = Upstream(Writer(folder / "arrived"))
    async with listening(upstream) as address, aiohttp.ClientSession() as http:
        door = Door("bare", int(address.rpartition(":")[2]), ())
        cases = iter(range(1, 1000)).__next__
        yield Client(ledger, Faults(0.0), random.Random(1), http, cases), ledger, door


async def test_without_a_guard_all_that_is_unsafe_is_leaked_and_nothing_is_screened(
    tmp_path: Path,
) -> None:
    async with client(tmp_path) as (asks, ledger, door):
        for _ in range(40):
            await asks.chat(door)
    assert ledger.wrongs["leaked"] and not ledger.wrongs["lost"]
    ledger.settle(Journals.read([], [tmp_path / "arrived"]), ())
    passed = sum(n for (kind, result), n in ledger.ended.items() if result == "passed")
    assert passed and ledger.wrongs["unscreened"] >= passed


async def test_door_that_is_shut_loses_requests(tmp_path: Path) -> None:
    async with client(tmp_path) as (asks, ledger, door):
        await asks.chat(replace(door, port=1))
    assert ledger.wrongs == {"lost": 1} and not ledger.well


async def test_script_comes_back_from_its_header() -> None:
    script = Script(3, 5, unsafe_at=2)
    assert Script.of(script.header()) == script and script.unsafe and HEADER
    assert case_of("x (case 3) y") == 3 and case_of("x") == 0


def test_policies_do_as_their_versions_say(tmp_path: Path) -> None:
    policies = Policies(tmp_path / "policies")
    actions = set()
    for _ in range(2):
        policies.renew()
        served = Settings(model="fake", policies=(policies.folder,))
        with local_server(served) as target, grpc.insecure_channel(target) as channel:
            for name, version in list(policies.digests)[-2:]:
                verdict = ask(channel, name)
                assert policies.fits(verdict.policy)
                assert verdict.action == action_of(name, version, unsafe=True)
                actions.add(verdict.action)
    assert actions == {verdict_pb2.ACTION_FLAG, verdict_pb2.ACTION_BLOCK}


def ask(channel: grpc.Channel, policy: str) -> verdict_pb2.Verdict:
    part = guard_pb2.Part(text="fake-bomb")
    message = guard_pb2.Message(role=guard_pb2.ROLE_USER, parts=[part])
    conversation = guard_pb2.Conversation(messages=[message])
    stub = guard_pb2_grpc.GuardServiceStub(channel)
    request = guard_pb2.ClassifyRequest(conversation=conversation, policy=policy)
    return stub.Classify(request, timeout=60).verdict


async def test_guard_with_other_policies_than_were_written_is_found(tmp_path: Path) -> None:
    served, written = Policies(tmp_path / "served"), Policies(tmp_path / "written")
    served.renew()
    ledger = Ledger()
    caller = Caller(ledger, Faults(0.0), written, random.Random(1), iter(range(99)).__next__)
    with local_server(Settings(model="fake-vision", policies=(served.folder,))) as target:
        guard = Guard.at("g", target)
        for _ in range(10):
            await caller.call(guard)
        await guard.channel.close()
    assert ledger.wrongs["mixed"] and not ledger.wrongs["lost"]


async def test_guard_that_is_not_there_is_unexplained_unless_it_was_broken(tmp_path: Path) -> None:
    ledger, faults = Ledger(), Faults(0.0)
    policies = Policies(tmp_path / "policies")
    caller = Caller(ledger, faults, policies, random.Random(1), iter(range(99)).__next__)
    guard = Guard.at("g", f"unix:{tmp_path / 'nobody'}")
    await caller.call(guard)
    assert ledger.wrongs == {"unexplained": 1}
    faults.begin("g")
    await caller.call(guard)
    await guard.channel.close()
    assert ledger.wrongs == {"unexplained": 1}


def test_report_tells_every_count() -> None:
    ledger = Ledger()
    ledger.wrong("leaked", "some words")
    ledger.ended["unary, g", "verdict"] += 3
    process = SimpleNamespace(name="p", starts=1, samples={})
    done = report.Run(1, 2.0, "interrupted", ledger, Faults(0.0), [process])  # type: ignore[list-item]
    text = report.markdown(done)
    assert "| leaked | 1 |" in text and "| lost | 0 |" in text and "leaked: some words" in text
    assert "| unary, g | verdict | 3 |" in text and "interrupted" in text
