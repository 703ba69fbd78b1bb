"""What traces tell of a verdict: names, digests and numbers, no content."""

from __future__ import annotations

from guard_service.moderation import Judgement
from guard_service.tracing import Value


def noted(judgement: Judgement) -> dict[str, Value]:
    """Attributes of a judged conversation's span, named as `Spot.note` has it."""
    decision, policy = judgement.decision, judgement.policy
    values: dict[str, Value] = {
        "verdict_id": judgement.id,
        "action": decision.action.value,
        "direction": judgement.built.direction.value,
        "categories_fired": sorted(o.category.code for o in decision.outcomes if o.fired),
        "policy__name": policy.name,
        "policy__digest": policy.digest,
        "model__digest": judgement.model.digest,
        "tokens__computed": judgement.computed_tokens,
        "tokens__cached": judgement.cached_tokens,
        "from_cache": judgement.from_cache,
        "prompts": len(judgement.built.prompts),
        # A generative model read those tokens; it wrote none.
        "gen_ai__request__model": judgement.model.name,
        "gen_ai__usage__input_tokens": judgement.computed_tokens + judgement.cached_tokens,
        "gen_ai__usage__cache_read__input_tokens": judgement.cached_tokens,
    }
    if judgement.tier:
        values |= {"tier__name": judgement.tier, "tier__reason": judgement.tier_reason}
    return values
