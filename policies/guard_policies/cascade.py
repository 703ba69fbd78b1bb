"""Which guard of a cascade decides, and why: a pure function of what the first one found."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from guard_policies.assessment import Direction
from guard_policies.decide import Decision
from guard_policies.schema import Cascade


class Why(Enum):
    """Why a tier decided; the spelling is the one that verdicts and metrics carry."""

    OUTSIDE_BAND = "OUTSIDE_BAND"  # first: it was sure enough
    IN_BAND = "IN_BAND"  # second
    CATEGORY = "CATEGORY"  # second: a category that the policy leaves to it
    IMAGE = "IMAGE"  # second
    SECOND_UNABLE = "SECOND_UNABLE"  # first: the policy says that its verdict holds then
    POLICY_IS_OFF = "POLICY_IS_OFF"  # first: the policy judges nothing in this direction


def sent_up(cascade: Cascade, decisions: Iterable[Decision], direction: Direction) -> Why | None:
    """Why the second guard must decide after what the first made of a text; None: it need not.

    `decisions` holds one for each window of the text: one that must go up takes the whole along.
    """
    found = tuple(decisions)
    if any(_has_category(cascade, decision) for decision in found):
        return Why.CATEGORY
    if (band := cascade.bands.get(direction)) is not None:
        low, high = band
        if any(low <= decision.unsafe_score <= high for decision in found):
            return Why.IN_BAND
    return None


def _has_category(cascade: Cascade, decision: Decision) -> bool:
    never = 2.0  # above every score
    return any(
        one.score >= cascade.categories.get(one.category.code, never) for one in decision.outcomes
    )
