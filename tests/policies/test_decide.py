"""Properties of the decision that hold for all policies and scores."""

import json
import math
from math import fsum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_policies.assessment import Action, Assessment, Direction
from guard_policies.decide import Outcome, decide, evidence
from guard_policies.loader import builtin_policies, parse_policy
from guard_policies.schema import Policy, Unscannable

# A busy machine is no defect, and parsing a policy for each example takes milliseconds.
unhurried = settings(deadline=None)
CODES = [f"S{n}" for n in range(1, 15)]
CALM = {code: 0.0 for code in CODES}
THRESHOLDS = st.floats(0.0001, 1.0)
DIRECTIONS = st.sampled_from(list(Direction))


def policy_of(**said: object) -> Policy:
    return parse_policy(json.dumps({"name": "a", "version": "1", **said}))


@st.composite
def policies(draw: st.DrawFn, mode: str = "enforce") -> Policy:
    rule = st.fixed_dictionaries(
        {"action": st.sampled_from(["allow", "flag", "block"]), "threshold": THRESHOLDS}
    )
    categories = draw(st.dictionaries(st.sampled_from(CODES), rule, max_size=14))
    unscannable = draw(st.sampled_from(["allow", "flag", "block"]))
    return policy_of(mode=mode, categories=categories, on_unscannable=unscannable)


@st.composite
def scores(draw: st.DrawFn) -> dict[str, float]:
    """A split of P(unsafe) among the categories, as a model gives it."""
    weights = draw(st.lists(st.floats(0.0, 1.0), min_size=14, max_size=14))
    unsafe = draw(st.floats(0.0, 1.0))
    total = fsum(weights) or 1.0
    return {
        code: min(1.0, unsafe * weight / total) for code, weight in zip(CODES, weights, strict=True)
    }


def assessment_of(some: dict[str, float]) -> Assessment:
    return Assessment(min(1.0, fsum(some.values())), some)


@unhurried
@given(policies(), scores(), st.sampled_from(CODES), st.floats(0.0, 1.0), DIRECTIONS)
def test_more_harm_never_leads_to_less(
    policy: Policy, some: dict[str, float], code: str, more: float, direction: Direction
) -> None:
    worse = some | {code: max(some[code], more)}
    before = decide(policy, assessment_of(some), direction)
    after = decide(policy, assessment_of(worse), direction)
    assert after.action.severity >= before.action.severity
    assert after.unsafe_score >= before.unsafe_score


@unhurried
@given(policies(), scores(), st.permutations(CODES))
def test_the_order_of_categories_does_not_matter(
    policy: Policy, some: dict[str, float], order: list[str]
) -> None:
    shuffled = {code: some[code] for code in order}
    direction = Direction.PROMPT
    assert decide(policy, assessment_of(shuffled), direction) == decide(
        policy, assessment_of(some), direction
    )
    outcomes = decide(policy, assessment_of(some), direction).outcomes
    by_code = {one.category.code: one for one in outcomes}
    turned = [by_code[code] for code in order]
    for action in (Action.FLAG, Action.BLOCK):
        assert evidence(turned, action) == evidence(outcomes, action)


@unhurried
@given(scores(), THRESHOLDS)
def test_with_one_threshold_it_is_the_rule_of_llama_guard(
    some: dict[str, float], threshold: float
) -> None:
    decision = decide(policy_of(threshold=threshold), assessment_of(some), Direction.PROMPT)
    assert (decision.action is Action.BLOCK) == (fsum(some.values()) >= threshold)


@unhurried
@given(scores())
def test_the_very_probability_is_enough(some: dict[str, float]) -> None:
    """At the boundary itself: the threshold equals the sum of the scores."""
    total = fsum(some.values())
    if 0.0001 <= total <= 1.0:
        decision = decide(policy_of(threshold=total), assessment_of(some), Direction.RESPONSE)
        assert decision.action is Action.BLOCK
        above = math.nextafter(total, 2.0)
        if above <= 1.0:
            decision = decide(policy_of(threshold=above), assessment_of(some), Direction.RESPONSE)
            assert decision.action is Action.ALLOW


@unhurried
@given(policies(), scores(), DIRECTIONS)
def test_a_category_that_fires_has_its_action(
    policy: Policy, some: dict[str, float], direction: Direction
) -> None:
    decision = decide(policy, assessment_of(some), direction)
    fired = [one for one in decision.outcomes if one.fired]
    assert all(decision.action.severity >= one.action.severity for one in fired)
    alone = any(one.action.severity >= decision.action.severity for one in fired)
    assert decision.joint == (decision.action is not Action.ALLOW and not alone)


@unhurried
@given(policies(mode="shadow"), scores(), DIRECTIONS, st.booleans())
def test_shadow_always_allows_and_says_what_it_would_have_done(
    policy: Policy, some: dict[str, float], direction: Direction, unscannable: bool
) -> None:
    decision = decide(policy, assessment_of(some), direction, "", unscannable)
    assert decision.action is Action.ALLOW
    assert decision.shadow_action is not None


@unhurried
@given(policies(), scores(), DIRECTIONS)
def test_what_nobody_could_read_never_makes_it_milder(
    policy: Policy, some: dict[str, float], direction: Direction
) -> None:
    read = decide(policy, assessment_of(some), direction)
    unread = decide(policy, assessment_of(some), direction, unscannable=True)
    floor = Action(policy.on_unscannable(direction).value)
    assert unread.action.severity == max(read.action.severity, floor.severity)
    assert unread.outcomes == read.outcomes


@unhurried
@given(policies(), scores(), DIRECTIONS)
def test_each_judged_category_has_an_outcome_in_the_policys_order(
    policy: Policy, some: dict[str, float], direction: Direction
) -> None:
    decision = decide(policy, assessment_of(some), direction)
    assert [one.category for one in decision.outcomes] == list(policy.judged(direction))
    assert 0.0 <= decision.unsafe_score <= 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.001, 1.001, -math.inf])
def test_scores_that_are_no_probabilities_have_no_decision(bad: float) -> None:
    policy = builtin_policies()["default"]
    for assessment in (
        Assessment(bad, CALM),
        Assessment(0.5, CALM | {"S3": bad}),
        Assessment(0.5, CALM | {"S99": bad}),
    ):
        with pytest.raises(ValueError, match="not a probability"):
            decide(policy, assessment, Direction.PROMPT)


def test_a_judged_category_without_a_score_has_no_decision() -> None:
    some = {code: score for code, score in CALM.items() if code != "S14"}
    with pytest.raises(ValueError, match="no score for S14"):
        decide(builtin_policies()["default"], Assessment(0.0, some), Direction.PROMPT)


def test_scores_of_categories_that_are_off_are_not_needed_and_do_not_count() -> None:
    policy = policy_of(action="off", categories={"S1": "block"})
    decision = decide(policy, Assessment(0.9, {"S1": 0.1, "S2": 0.8}), Direction.PROMPT)
    assert (decision.action, decision.unsafe_score) == (Action.ALLOW, 0.1)


def test_what_the_policy_makes_an_error_has_no_decision() -> None:
    policy = builtin_policies()["default"]
    assert policy.on_unscannable(Direction.PROMPT) is Unscannable.ERROR
    with pytest.raises(ValueError, match="unscannable"):
        decide(policy, Assessment(0.0, CALM), Direction.PROMPT, unscannable=True)


def test_an_unread_part_is_no_joint_evidence() -> None:
    policy = policy_of(on_unscannable="block", action="flag")
    some = CALM | {"S1": 0.25, "S2": 0.25}
    assert decide(policy, Assessment(0.5, some), Direction.PROMPT).joint
    decision = decide(policy, Assessment(0.5, some), Direction.PROMPT, unscannable=True)
    assert (decision.action, decision.joint) == (Action.BLOCK, False)


def test_a_lower_threshold_makes_a_category_count_for_more() -> None:
    policy = policy_of(categories={"S4": {"threshold": 0.2}})
    outcomes = decide(
        policy, assessment_of(CALM | {"S4": 0.1, "S5": 0.2}), Direction.PROMPT
    ).outcomes
    assert evidence(outcomes, Action.BLOCK) == 0.1 / 0.2 + 0.2 / 0.5


def test_outcomes_show_the_rule_whether_it_fired_or_not() -> None:
    decision = decide(
        policy_of(categories={"S10": {"threshold": 0.25, "action": "flag"}}),
        assessment_of(CALM | {"S10": 0.25}),
        Direction.PROMPT,
        "de-CH",
    )
    hate = decision.outcomes[9]
    assert hate == Outcome(hate.category, 0.25, 0.25, True, Action.FLAG)
    assert not decision.outcomes[0].fired
    assert decision.outcomes[0].action is Action.BLOCK
