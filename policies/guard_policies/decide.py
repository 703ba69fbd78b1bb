"""From what a model found and what a policy wants to what is done: a pure function."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from guard_policies.assessment import Action, Assessment, Direction
from guard_policies.schema import Mode, Policy, Unscannable
from guard_policies.taxonomy import Category


@dataclass(frozen=True, slots=True)
class Outcome:
    """One category's score beside its rule; `action` is the rule's, whether it fired or not."""

    category: Category
    score: float
    threshold: float
    fired: bool
    action: Action


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done. In shadow mode `action` is ALLOW and `shadow_action` what it would have been.

    `unsafe_score` counts the policy's categories only. `joint`: no category fired whose action is
    as severe, several together did.
    """

    action: Action
    shadow_action: Action | None
    unsafe_score: float
    outcomes: tuple[Outcome, ...]
    joint: bool


def decide(
    policy: Policy,
    assessment: Assessment,
    direction: Direction,
    language: str = "",
    unscannable: bool = False,
) -> Decision:
    """Weigh every category's score against its rule; the severest action with enough evidence wins.

    `unscannable` says that a part could not be judged; the policy's action for that counts too.
    Raises ValueError for scores that are no probabilities, for a judged category without a score,
    and for `unscannable` under a policy that makes it an error: none of these has a decision.
    """
    _check(assessment)
    outcomes = _outcomes(policy, assessment, direction, language)
    action = _severest(outcomes)
    joint = action is not Action.ALLOW and not any(
        one.fired and one.action.severity >= action.severity for one in outcomes
    )
    if unscannable:
        floor = _unscannable(policy.on_unscannable(direction))
        if floor.severity > action.severity:
            action, joint = floor, False
    shadow = policy.mode is Mode.SHADOW
    return Decision(
        action=Action.ALLOW if shadow else action,
        shadow_action=action if shadow else None,
        unsafe_score=min(1.0, fsum(one.score for one in outcomes)),
        outcomes=outcomes,
        joint=joint,
    )


def evidence(outcomes: Sequence[Outcome], action: Action) -> float:
    """Sum of score / threshold over the categories whose action is at least this one.

    Scores of equal thresholds are added first, and exactly, so that with one threshold t the
    result reaches 1 if and only if the sum of the scores reaches t.
    """
    scores: dict[float, list[float]] = defaultdict(list)
    for one in outcomes:
        if one.action.severity >= action.severity:
            scores[one.threshold].append(one.score)
    return fsum(fsum(some) / threshold for threshold, some in scores.items())


def _check(assessment: Assessment) -> None:
    for score in (assessment.unsafe_score, *assessment.category_scores.values()):
        if not 0.0 <= score <= 1.0:  # NaN compares false
            raise ValueError(f"a score is not a probability: {score}")


def _outcomes(
    policy: Policy, assessment: Assessment, direction: Direction, language: str
) -> tuple[Outcome, ...]:
    outcomes = []
    for rule in policy.rules(direction, language):
        score = assessment.category_scores.get(rule.category.code)
        if score is None:
            raise ValueError(f"the assessment has no score for {rule.category.code}")
        fired = score >= rule.threshold
        outcomes.append(Outcome(rule.category, score, rule.threshold, fired, rule.action))
    return tuple(outcomes)


def _severest(outcomes: Sequence[Outcome]) -> Action:
    taken = (one for one in (Action.BLOCK, Action.FLAG) if evidence(outcomes, one) >= 1.0)
    return next(taken, Action.ALLOW)


def _unscannable(wanted: Unscannable) -> Action:
    if wanted is Unscannable.ERROR:
        raise ValueError("the policy makes an unscannable part an error; it has no decision")
    return Action(wanted.value)
