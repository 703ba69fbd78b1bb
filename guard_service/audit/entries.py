"""What a line of the audit log says of a verdict, of a conversation without one, of a refusal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from guard_policies.schema import Policy
from guard_service.audit.prints import fingerprint, last_turn
from guard_service.conversation import Conversation, Image, Part, ToolCall
from guard_service.errors import GuardServiceError
from guard_service.moderation import LANGUAGE_TAG, Judgement

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asker:
    """The call that a line is of."""

    rpc: str = ""
    request_id: str = ""
    tenant: str = ""
    trace_id: str = ""

    @property
    def entry(self) -> Entry:
        """As a line has it."""
        return {
            "rpc": self.rpc,
            "request_id": self.request_id,
            "tenant": self.tenant,
            "trace_id": self.trace_id,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked. `step` counts the verdicts of a stream, whose own name is `stream`."""

    conversation: Conversation
    policy: Policy
    language: str
    no_cache: bool
    as_second: bool
    stream: str = ""
    step: int = 0

    @property
    def weight(self) -> int:
        """About how many bytes of content there are."""
        return sum(
            len(field)
            for message in self.conversation.messages
            for part in message.parts
            for field in _contents(part)
        )

    def entry(self, prints: bytes) -> Entry:
        """As a line has it: fingerprints by the key, no content."""
        asked: Entry = {
            "policy": {
                "name": self.policy.name,
                "version": self.policy.version,
                "digest": self.policy.digest,
            },
            "language": self.language if LANGUAGE_TAG.fullmatch(self.language) else "",
            "no_cache": self.no_cache,
            "as_second": self.as_second,
            "fingerprints": {
                "conversation": fingerprint(self.conversation, prints),
                "last_turn": last_turn(self.conversation, prints),
            },
        }
        if self.stream:
            asked |= {"stream": self.stream, "step": self.step}
        return asked


def verdict(asker: Asker, question: Question, judgement: Judgement, prints: bytes) -> Entry:
    """Floats are the very ones that were decided by."""
    decision, model = judgement.decision, judgement.model
    entry: Entry = {
        "kind": "verdict",
        **asker.entry,
        "verdict_id": judgement.id,
        **question.entry(prints),
        "model": {"name": model.name, "digest": model.digest},
        "engine": {"name": model.engine, "plan": model.plan},
        "tier": judgement.tier,
        "tier_reason": judgement.tier_reason,
        "direction": judgement.built.direction.value,
        "action": decision.action.value,
        "unsafe": decision.unsafe_score,
        "scores": {o.category.code: o.score for o in decision.outcomes},
        "fired": {o.category.code: o.threshold for o in decision.outcomes if o.fired},
        "coverage": _coverage(judgement),
        "from_cache": judgement.from_cache,
        "tokens": {
            "computed": judgement.computed_tokens,
            "cached": judgement.cached_tokens,
        },
    }
    if decision.shadow_action is not None:
        entry["shadow_action"] = decision.shadow_action.value
    return entry


def unjudged(asker: Asker, question: Question, error: GuardServiceError, prints: bytes) -> Entry:
    """A conversation that got no verdict."""
    return {"kind": "unjudged", **asker.entry, **question.entry(prints), **_why(error)}


def refused(asker: Asker, error: GuardServiceError) -> Entry:
    """A call, or an item of a batch, that was not put before a guard."""
    return {"kind": "refused", **asker.entry, **_why(error)}


def gone(asker: Asker, code: str) -> Entry:
    """A call whose caller did not wait for its end."""
    return {"kind": "refused", **asker.entry, "code": code, "reason": "CALLER_GONE"}


def _contents(part: Part) -> tuple[str | bytes, ...]:
    match part:
        case Image():
            return (part.data or b"",)
        case ToolCall():
            return part.name, part.arguments
        case _:
            return (part.text,)


def _why(error: GuardServiceError) -> Entry:
    return {
        "code": error.code.name,
        "reason": error.reason,
        "on_unavailable": error.on_unavailable,
    }


def _coverage(judgement: Judgement) -> Entry:
    built = judgement.built
    return {
        "complete": all(part.judged for part in built.parts),
        "parts": len(built.parts),
        "not_judged": Counter(part.reason for part in built.parts if not part.judged),
        "partly": Counter(part.reason for part in built.parts if part.partly),
        "neutralised": sum(part.neutralised for part in built.parts),
        "tokens": built.conversation_tokens,
        "windows": [
            [*span, score]
            for span, score in zip(built.windows, judgement.window_scores, strict=True)
        ],
        "unknown_categories": list(judgement.unknown_categories),
    }
