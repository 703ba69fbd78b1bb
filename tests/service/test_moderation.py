"""The road from request to verdict, over real sockets."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_policies.assessment import Assessment, Direction
from guard_policies.loader import parse_policy
from guard_service.engines import Assessed
from guard_service.engines.fake import FakeEngine
from guard_service.matching import asked_of, unknown_to, unsupported
from guard_service.prompt import Prompt
from tests.service.asking import BOMB, Running, asked, message, refused, until
from tests.service.conftest import RunGuard

LENIENT = """\
name: lenient
version: "1"
description: Lets weapons pass.
categories:
  S9: {action: allow}
"""
FLAGGING = """\
name: flagging
version: "1"
description: Flags hate, blocks weapons.
categories:
  S10: {action: flag}
"""
CUSTOM = """\
name: house-rules
version: "1"
description: Brings a category of its own.
categories:
  S20: {name: Spoilers, description: Gives away the end of a film.}
"""


REPLIES_ONLY = """\
name: replies-only
version: "1"
prompt: off
"""
ONLY_S14 = """\
name: only-code
version: "1"
action: off
categories:
  S14: block
"""
OWN_S14 = """\
name: own-code
version: "1"
categories:
  S14: {name: Shells, description: Asks for a shell.}
"""


class Held(FakeEngine):
    """Holds its runs while the gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.before_run = lambda texts: (self.gate.wait(20), None)[1]

    def saw(self, text: str) -> int:
        """In how many prompts a text was."""
        return sum(text in prompt for batch in self.batches for prompt in batch)


async def test_one_conversation_gets_each_policys_own_verdict(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=(LENIENT,))
    for _ in range(2):
        strict = (await guard.stub.Classify(asked(BOMB))).verdict
        lenient = (await guard.stub.Classify(asked(BOMB, policy="lenient"))).verdict
        assert strict.action == verdict_pb2.ACTION_BLOCK
        assert lenient.action == verdict_pb2.ACTION_ALLOW
    assert strict.from_cache and lenient.from_cache


async def test_direction_and_language_are_part_of_what_is_cached(guard: Running) -> None:
    requests = [
        asked("x"),
        asked(message("x", "assistant")),
        asked("x", language="de"),
        asked("x "),
        asked("X"),
    ]
    verdicts = [(await guard.stub.Classify(request)).verdict for request in requests]
    assert not any(verdict.from_cache for verdict in verdicts)


async def test_policies_share_the_prefix_of_a_model_with_fixed_categories(
    run_guard: RunGuard,
) -> None:
    guard = await run_guard(policies=(LENIENT,))
    verdict = (await guard.stub.Classify(asked("new", policy="lenient"))).verdict
    assert verdict.timing.cached_tokens > 0


@pytest.mark.parametrize("place", [0, 20, 40])
async def test_the_worst_window_counts(run_guard: RunGuard, place: int) -> None:
    guard = await run_guard(FakeEngine(window_tokens=128))
    words = ["hello there"] * 40
    words.insert(place, "fake-bomb")
    verdict = (await guard.stub.Classify(asked(" ".join(words)))).verdict
    windows = verdict.coverage.windows
    assert verdict.action == verdict_pb2.ACTION_BLOCK
    assert len(windows) > 3
    assert max(w.unsafe_score for w in windows) == pytest.approx(verdict.unsafe_score)
    assert windows[0].first_token == 0
    assert windows[-1].end_token == verdict.coverage.conversation_tokens
    assert all(a.end_token > b.first_token for a, b in zip(windows, windows[1:], strict=False))


async def test_the_severest_window_wins_over_the_surest(run_guard: RunGuard) -> None:
    class Graded(FakeEngine):
        def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
            assessed = super().assess(prompts)
            return [self._graded(one) for one in assessed]

        @staticmethod
        def _graded(one: Assessed) -> Assessed:
            scores = dict(one.assessment.category_scores)
            if scores["S9"] > 0.5:
                scores = dict.fromkeys(scores, 0.0) | {"S9": 0.6}
            return Assessed(Assessment(0.99, scores), one.computed_tokens, one.cached_tokens)

    guard = await run_guard(Graded(window_tokens=128), (FLAGGING,))
    text = "fake-hate " + "hello there " * 30 + BOMB
    verdict = (await guard.stub.Classify(asked(text, policy="flagging"))).verdict
    assert verdict.action == verdict_pb2.ACTION_BLOCK
    assert [result.code for result in verdict.categories if result.fired] == ["S9"]


async def test_identical_concurrent_requests_are_judged_once(run_guard: RunGuard) -> None:
    engine = Held()
    guard = await run_guard(engine)
    engine.gate.clear()
    calls = [guard.stub.Classify(asked("the same")) for _ in range(5)]
    await until(lambda: engine.saw("the same") == 1)
    engine.gate.set()
    verdicts = [(await call).verdict for call in calls]
    assert sorted(verdict.from_cache for verdict in verdicts) == [False, True, True, True, True]
    assert len({verdict.verdict_id for verdict in verdicts}) == 5
    assert engine.saw("the same") == 1


async def test_a_caller_with_more_time_outlives_the_one_it_joined(run_guard: RunGuard) -> None:
    engine = Held()
    guard = await run_guard(engine)
    engine.gate.clear()
    hurried = guard.stub.Classify(asked("the same"), timeout=0.2)
    await until(lambda: engine.saw("the same") == 1)
    patient = guard.stub.Classify(asked("the same"), timeout=20)
    assert (await refused(hurried)).code == grpc.StatusCode.DEADLINE_EXCEEDED
    engine.gate.set()
    assert (await patient).verdict.action == verdict_pb2.ACTION_ALLOW


async def test_a_call_that_is_cancelled_or_out_of_time_is_never_run(run_guard: RunGuard) -> None:
    engine = Held()
    guard = await run_guard(engine)
    batcher = guard.server.batcher
    engine.gate.clear()
    first = guard.stub.Classify(asked("first"))
    await until(lambda: engine.saw("first") == 1)
    gone = guard.stub.Classify(asked("gone"))
    await until(lambda: batcher.queued_items == 1)
    gone.cancel()
    late = guard.stub.Classify(asked("late"), timeout=0.2)
    assert (await refused(late)).code == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: batcher.queued_items == 0)
    engine.gate.set()
    await first
    await guard.stub.Classify(asked("last"))
    assert (engine.saw("gone"), engine.saw("late"), engine.saw("last")) == (0, 0, 1)


async def test_the_default_deadline_holds_for_calls_without_one(run_guard: RunGuard) -> None:
    engine = Held()
    guard = await run_guard(engine, default_deadline_s=0.1)
    engine.gate.clear()
    refusal = await refused(guard.stub.Classify(asked("slow")))
    engine.gate.set()
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXCEEDED",
    )
    assert refusal.metadata["on_unavailable"] == "block"


async def test_a_policy_the_model_cannot_serve_is_refused(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=(CUSTOM,))
    refusal = await refused(guard.stub.Classify(asked("x", policy="house-rules")))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "POLICY_NOT_SUPPORTED",
    )
    assert "S20" in refusal.message


async def test_a_direction_that_is_off_is_answered_without_the_model(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=(REPLIES_ONLY,))
    warm = len(guard.engine.batches)
    image = guard_pb2.Part(image=guard_pb2.Image(data=b"\x89PNG"))
    request = asked(BOMB, policy="replies-only")
    request.conversation.messages[0].parts.append(image)
    for _ in range(2):
        verdict = (await guard.stub.Classify(request)).verdict
        assert verdict.action == verdict_pb2.ACTION_ALLOW
        assert not verdict.categories and not verdict.from_cache
        coverage = verdict.coverage
        assert not coverage.complete and not coverage.windows
        assert [(part.state, part.reason) for part in coverage.parts] == [
            (verdict_pb2.PART_STATE_NOT_JUDGED, "POLICY_IS_OFF")
        ] * 2
        assert coverage.conversation_tokens > len(BOMB)
        assert verdict.timing.computed_tokens == verdict.timing.cached_tokens == 0
    assert len(guard.engine.batches) == warm
    reply = message(BOMB, "assistant")
    verdict = (await guard.stub.Classify(asked("hi", reply, policy="replies-only"))).verdict
    assert verdict.action == verdict_pb2.ACTION_BLOCK and verdict.coverage.complete


class Thirteen(FakeEngine):
    """Knows S1 to S13 and takes categories, as Llama Guard 3 1B does; `listed` is what it read."""

    def __init__(self) -> None:
        super().__init__(custom_categories=True, categories=[f"S{i}" for i in range(1, 14)])
        self.listed: set[tuple[str, ...]] = set()

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        self.listed |= {prompt.categories for prompt in prompts}
        return [self._of_these(one) for one in super().assess(prompts)]

    def _of_these(self, one: Assessed) -> Assessed:
        (listed,) = self.listed
        scores = {code: one.assessment.category_scores[code] for code in listed}
        return replace(one, assessment=Assessment(one.assessment.unsafe_score, scores))


async def test_s14_is_not_asked_of_a_model_that_does_not_know_it(run_guard: RunGuard) -> None:
    engine = Thirteen()
    guard = await run_guard(engine)
    verdict = (await guard.stub.Classify(asked(BOMB))).verdict
    assert engine.listed == {tuple(f"S{i}" for i in range(1, 14))}
    assert verdict.action == verdict_pb2.ACTION_BLOCK
    assert verdict.coverage.unknown_categories == ["S14"]
    assert (verdict.categories[-1].code, verdict.categories[-1].score) == ("S14", 0.0)


def test_s14_in_a_policys_own_words_is_asked_of_any_model_that_takes_categories() -> None:
    card, own = Thirteen().card, parse_policy(OWN_S14)
    assert [one.code for one in asked_of(own, card, Direction.PROMPT)][-2:] == ["S13", "S14"]
    assert not unknown_to(own, card, Direction.PROMPT) and not unsupported(own, card)


@pytest.mark.parametrize(
    ("policy", "codes", "told"),
    [(ONLY_S14, ["S14"], "judges only S14"), (CUSTOM, [f"S{i}" for i in range(1, 20)], "S20")],
)
def test_a_policy_of_which_a_model_can_be_asked_nothing_is_not_for_it(
    policy: str, codes: list[str], told: str
) -> None:
    card = replace(Thirteen().card, custom_codes=tuple(codes))
    assert told in unsupported(parse_policy(policy), card)


@pytest.mark.parametrize(
    "assessment",
    [
        Assessment(math.nan, {f"S{i}": 0.0 for i in range(1, 15)}),
        Assessment(0.1, {f"S{i}": math.nan for i in range(1, 15)}),
        Assessment(0.1, {"S1": 0.1}),
        Assessment(1.5, {f"S{i}": 0.0 for i in range(1, 15)}),
    ],
    ids=["nan", "nan by category", "a category without a score", "above one"],
)
async def test_scores_that_are_none_are_no_verdict(
    run_guard: RunGuard, assessment: Assessment
) -> None:
    class Confused(FakeEngine):
        def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
            return [Assessed(assessment, 1, 0) for _ in super().assess(prompts)]

    guard = await run_guard(Confused())
    for _ in range(2):
        refusal = await refused(guard.stub.Classify(asked("x")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")


async def test_batched_answers_equal_single_ones(run_guard: RunGuard) -> None:
    engine = Held()
    guard = await run_guard(engine, cache_entries=0)
    texts = [f"{'x' * 17 * i} {word}" for i in range(6) for word in ("hello", "fake-hate", "")]
    engine.gate.clear()
    first = guard.stub.Classify(asked("first"))
    await until(lambda: engine.saw("first") == 1)
    calls = [guard.stub.Classify(asked(text)) for text in texts]
    await until(lambda: guard.server.batcher.queued_items == len(texts))
    engine.gate.set()
    await first
    together = [await call for call in calls]
    alone = [await guard.stub.Classify(asked(text)) for text in texts]
    assert [_meaning(a.verdict) for a in together] == [_meaning(b.verdict) for b in alone]
    assert any(len(batch) > 1 for batch in engine.batches)


def _meaning(verdict: verdict_pb2.Verdict) -> tuple[int, float, list[float]]:
    return verdict.action, verdict.unsafe_score, [one.score for one in verdict.categories]
