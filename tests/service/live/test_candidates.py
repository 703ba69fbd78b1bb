"""Candidates for a policy's place: compared from one run of the model, given their share."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard_api.v1 import guard_pb2
from guard_policies.loader import load_policies, parse_policy
from guard_policies.positions import PolicyError
from guard_service.cli.app import app
from guard_service.conversation import Conversation
from guard_service.engines.fake import FakeEngine
from guard_service.errors import PolicyNotSupported
from guard_service.live.candidates import Candidates
from guard_service.metrics import Metrics
from guard_service.wire import policy_summary_of
from tests.service.asking import BOMB, Running, asked, fetched, message, piece, start
from tests.service.conftest import RunGuard

SHOP = "name: shop\nversion: '1'\n"
NEXT = "name: next\nversion: '2'\nthreshold: 0.99\ncandidate: {for: shop, share: %s}\n"


def two(share: float = 0.0, more: str = "") -> tuple[str, str]:
    """A policy that blocks what the fake engine finds, and a candidate that never does."""
    return SHOP, NEXT % share + more


async def verdict(guard: Running, *turns: Any, policy: str = "shop") -> Any:
    return (await guard.stub.Classify(asked(*turns, policy=policy))).verdict


async def summary(guard: Running, name: str) -> guard_pb2.PolicySummary:
    listed = await guard.stub.ListPolicies(guard_pb2.ListPoliciesRequest())
    found: guard_pb2.PolicySummary
    (found,) = (one for one in listed.policies if one.policy.name == name)
    return found


async def test_a_candidate_is_compared_from_the_same_run_and_decides_nothing(
    run_guard: RunGuard,
) -> None:
    guard = await run_guard(policies=two(), metrics=True, metrics_port=0)
    runs = len(guard.engine.batches)
    found = [await verdict(guard, text) for text in (BOMB, "hello", "good day")]
    assert {one.policy.name for one in found} == {"shop"}
    assert [one.action for one in found] == [3, 1, 1]
    assert len(guard.engine.batches) == runs + 3
    told = (await summary(guard, "next")).candidate
    wishes = {(one.action, one.candidate_action): one.verdicts for one in told.wishes}
    assert (told.policy, told.share, wishes) == ("shop", 0.0, {(3, 1): 1, (1, 1): 2})
    assert not (await summary(guard, "shop")).HasField("candidate")
    shown = (await fetched(guard, "/metrics"))[1]
    labels = 'action="block",candidate="next",candidate_action="allow",policy="shop"'
    assert f"guard_candidate_verdicts_total{{{labels}}} 1.0" in shown


async def test_guardctl_shows_how_they_compare(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=two(5))

    async def shown() -> str:
        options = ["policies", "--server", guard.server.address]
        result = await asyncio.to_thread(CliRunner().invoke, app, options)
        return " ".join(result.stdout.split())

    assert "candidate for shop, decides 5 %; nothing compared yet" in await shown()
    for text in (BOMB, "hello", "good day", "good night"):
        await verdict(guard, text)
    assert "agrees on 75.0 % of 4: block -> allow 1" in await shown()


async def test_its_share_of_conversations_is_decided_by_it_always_the_same_ones(
    run_guard: RunGuard,
) -> None:
    guard = await run_guard(policies=two(30))
    sides: dict[int, str] = {}
    for number in range(200):
        sides[number] = (await verdict(guard, f"{number} {BOMB}")).policy.name
    chosen = [number for number, name in sides.items() if name == "next"]
    assert 30 < len(chosen) < 90
    for number in (*range(10), *chosen[:5]):
        grown = (f"{number} {BOMB}", message("a reply", "assistant"), "and then?")
        found = await verdict(guard, *grown)
        assert found.policy.name == sides[number]
    told = (await summary(guard, "next")).candidate
    wishes = {(one.action, one.candidate_action): one.verdicts for one in told.wishes}
    assert wishes == {(3, 1): 200 + 10 + 5}


async def test_a_stream_stays_on_its_side(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=two(50))
    names = set()
    for number in range(16):
        stream = guard.stub.ClassifyStream()
        await stream.write(start(f"hi {number}", policy="shop"))
        found = []
        for text in ("so", " far"):
            await stream.write(piece(text, check=True))
            found.append((await stream.read()).verdict.policy.name)
        await stream.write(piece(BOMB, end=True))
        last = (await stream.read()).verdict
        assert {*found, last.policy.name} == {found[0]}
        assert last.action == (3 if found[0] == "shop" else 1)
        assert (await verdict(guard, f"hi {number}")).policy.name == found[0]
        names.add(found[0])
    assert names == {"shop", "next"}


async def test_what_is_asked_for_by_its_own_name_is_judged_under_it(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=two(0))
    assert (await verdict(guard, BOMB, policy="next")).policy.name == "next"
    found = await guard.stub.Classify(asked(BOMB, policy="shop", as_second=True))
    assert found.verdict.policy.name == "shop"


async def test_what_was_counted_stays_while_both_policies_do(
    run_guard: RunGuard, tmp_path: Path
) -> None:
    def write(share: float, threshold: str = "0.99") -> None:
        (tmp_path / "shop.yaml").write_text(SHOP)
        (tmp_path / "next.yaml").write_text((NEXT % share).replace("0.99", threshold))

    write(0)
    guard = await run_guard(folders=(tmp_path,), reload_s=0.0)
    await verdict(guard, BOMB)
    write(100)
    await guard.server.watcher.reload()
    assert (await verdict(guard, BOMB)).policy.name == "next"
    told = (await summary(guard, "next")).candidate
    assert [(told.share, one.verdicts) for one in told.wishes] == [(100.0, 2)]
    write(100, "0.98")
    await guard.server.watcher.reload()
    assert not (await summary(guard, "next")).candidate.wishes


@pytest.mark.parametrize(
    ("more", "custom", "why"),
    [
        ("response: off\n", False, "something else about a response"),
        ("categories: {S6: off}\n", True, "something else about a prompt"),
        ("cascade: {band: [0, 1]}\n", False, "its cascade is another one"),
        ("image_uris: {hosts: [example.org]}\n", False, "its engine or image_uris"),
    ],
)
async def test_what_cannot_be_compared_is_refused(
    run_guard: RunGuard, more: str, custom: bool, why: str
) -> None:
    with pytest.raises(PolicyNotSupported, match=why):
        await run_guard(FakeEngine(custom_categories=custom), two(0, more))


async def test_a_model_with_fixed_categories_compares_other_categories_too(
    run_guard: RunGuard,
) -> None:
    guard = await run_guard(policies=two(0, "categories: {S9: off}\n"))
    await verdict(guard, BOMB)
    (wishes,) = (await summary(guard, "next")).candidate.wishes
    assert (wishes.action, wishes.candidate_action) == (3, 1)


async def test_a_candidate_that_makes_an_unread_part_an_error_has_no_decision(
    run_guard: RunGuard,
) -> None:
    lenient = SHOP + "on_unscannable: flag\n"
    guard = await run_guard(policies=(lenient, NEXT % 0))
    turn = message("see")
    turn.parts.append(guard_pb2.Part(image=guard_pb2.Image(uri="https://example.org/a.png")))
    assert (await verdict(guard, turn)).action == 2
    (wishes,) = (await summary(guard, "next")).candidate.wishes
    assert (wishes.action, wishes.candidate_action) == (2, 0)


def test_the_key_chooses_other_conversations() -> None:
    policies = {one.name: one for one in map(parse_policy, two(50))}
    card = FakeEngine().card

    def sides(key: bytes) -> list[str]:
        candidates = Candidates(policies, card, Metrics(), key)
        said = (Conversation.of(("user", f"text {n}")) for n in range(64))
        return [candidates.chosen(policies["shop"], one).name for one in said]

    assert sides(b"") == sides(b"") != sides(b"secret")
    assert {"shop", "next"} == set(sides(b"secret"))


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        ("{for: none-such}", "there is no policy 'none-such'"),
        ("{for: mine}", "no candidate for its own place"),
        ("{share: 3}", "needs `for`"),
        ("{for: default, share: 101}", "share"),
        ("{for: default, part: 1}", "part"),
        ("{for: other}", "is a candidate itself"),
        ("{for: default, share: 60}", "more than 100 % together"),
    ],
)
def test_mistakes_have_a_place(tmp_path: Path, candidate: str, problem: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: mine\nversion: '1'\ncandidate: {candidate}\n")
    other = "name: other\nversion: '1'\ncandidate: {for: default, share: 50}\n"
    (tmp_path / "another.yaml").write_text(other)
    with pytest.raises(PolicyError) as wrong:
        load_policies([tmp_path])
    (found,) = wrong.value.problems
    assert problem in found.message and found.file.endswith("mine.yaml")


def test_a_candidate_has_the_digest_that_it_has_without_its_terms() -> None:
    plain = parse_policy("name: next\nversion: '2'\nthreshold: 0.99\n")
    tried = parse_policy(NEXT % 5)
    assert plain.digest == tried.digest and plain != tried
    assert not policy_summary_of(plain).HasField("candidate")
