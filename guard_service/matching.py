"""What of a policy a model can serve, and what the model is asked about."""

from __future__ import annotations

from guard_policies.assessment import Direction
from guard_policies.schema import ANY_ENGINE, Policy
from guard_policies.taxonomy import BY_CODE, Category
from guard_service.engines import ModelCard


def unsupported(policy: Policy, card: ModelCard) -> str:
    """Why the model cannot serve the policy; empty when it can."""
    if policy.engine not in (ANY_ENGINE, card.engine, card.name):
        return f"policy {policy.name} wants engine {policy.engine}, not {card.name}"
    if card.custom_categories:
        return _unsupported_custom(policy, card)
    unknown = [c.code for c in policy.categories if c.code not in card.categories]
    if unknown:
        return (
            f"policy {policy.name} judges {', '.join(unknown)}, which model {card.name} "
            "does not know; drop them or load another model"
        )
    if policy.custom:
        return (
            f"policy {policy.name} brings its own wording of categories, and those of model "
            f"{card.name} are fixed; drop it or load another model"
        )
    return ""


def _unsupported_custom(policy: Policy, card: ModelCard) -> str:
    strange = [c.code for c in policy.categories if _is_own(c) and c.code not in card.custom_codes]
    if strange:
        return (
            f"policy {policy.name} has categories {', '.join(strange)}, and model {card.name} has "
            "no such codes; GetInfo lists them as custom_codes"
        )
    for direction in Direction:
        if policy.judged(direction) and not asked_of(policy, card, direction):
            codes = ", ".join(unknown_to(policy, card, direction))
            return (
                f"policy {policy.name} judges only {codes} in a {direction.value}, which model "
                f"{card.name} does not know; word them yourself, or load another model"
            )
    return ""


def _is_own(category: Category) -> bool:
    """Whether a policy brings this category or its wording."""
    return BY_CODE.get(category.code) != category


def asked_of(policy: Policy, card: ModelCard, direction: Direction) -> tuple[Category, ...]:
    """What a model that takes categories is asked about: the policy's own, and what it knows.

    S14 in its usual wording says nothing to models that were trained on S1 to S13, and would make
    their prompt another than the published one.
    """
    judged = policy.judged(direction)
    return tuple(one for one in judged if _is_own(one) or one.code in card.categories)


def unknown_to(policy: Policy, card: ModelCard, direction: Direction) -> tuple[str, ...]:
    """Codes that the policy judges and the model is not asked about."""
    if not card.custom_categories:
        return ()  # `unsupported` refuses such a policy
    asked = asked_of(policy, card, direction)
    return tuple(one.code for one in policy.judged(direction) if one not in asked)
