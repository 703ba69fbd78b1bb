"""What a guard tells about itself: models, limits, policies."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_middleware.verdict import ModelRef, PolicyRef, read_action, seconds
from guard_policies.assessment import Action
from guard_policies.schema import Stream, Unscannable, widening

# What is not known here is as if nothing had been declared.
_UNSCANNABLE = {
    guard_pb2.ON_UNSCANNABLE_ALLOW: Unscannable.ALLOW,
    guard_pb2.ON_UNSCANNABLE_FLAG: Unscannable.FLAG,
    guard_pb2.ON_UNSCANNABLE_BLOCK: Unscannable.BLOCK,
    guard_pb2.ON_UNSCANNABLE_ERROR: Unscannable.ERROR,
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model; `notice` must be shown with it where it is not empty."""

    model: ModelRef
    engine: str
    template: str
    categories: tuple[str, ...]
    judges_images: bool
    custom_categories: bool
    notice: str
    parameters: int
    window_tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are held to."""

    max_message_bytes: int
    max_batch_items: int
    max_conversation_tokens: int
    max_messages: int
    default_deadline_s: float
    max_images: int = 0  # this and what follows: 0 where no image is judged, or nothing is told
    max_image_bytes: int = 0
    max_image_pixels: int = 0


@dataclass(frozen=True, slots=True)
class Reloads:
    """How exchanging policies, or models, has gone: `problems` are the places of what failed last,
    empty where it did not."""

    generation: int
    loaded_at: datetime
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """What is running."""

    version: str
    models: tuple[ModelInfo, ...]
    limits: Limits
    started_at: datetime
    policy_reloads: Reloads | None = None  # where a guard tells
    model_reloads: Reloads | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that is tried for another one's place: `wishes` are those of both, None being no
    decision, and how often there were such; `share` is what it decides, in percent."""

    policy: str
    share: float
    wishes: tuple[tuple[Action | None, Action | None, int], ...]


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """A policy that requests may name, and what it wants callers to do."""

    policy: PolicyRef
    description: str
    shadow: bool
    categories: tuple[str, ...]
    on_unavailable_prompt: Action
    on_unavailable_response: Action
    on_unscannable_prompt: Unscannable
    on_unscannable_response: Unscannable
    refusals: tuple[tuple[str, str], ...]  # by language tag in lower case; "" is the base
    stream: Stream  # the usual one where a guard does not tell
    candidate: Candidate | None = None

    def refusal(self, language: str = "") -> str:
        """The text in place of what was blocked; empty where a guard does not tell any."""
        texts = dict(self.refusals)
        return next((texts[tag] for tag in widening(language) if tag in texts), "")


@dataclass(frozen=True, slots=True)
class PolicyList:
    """The loaded policies; `default_policy` is what an empty name means."""

    policies: tuple[PolicySummary, ...]
    default_policy: str


def read_info(wire: guard_pb2.GetInfoResponse) -> ServiceInfo:
    """Plain Python from the wire."""
    limits = Limits(
        max_message_bytes=wire.limits.max_message_bytes,
        max_batch_items=wire.limits.max_batch_items,
        max_conversation_tokens=wire.limits.max_conversation_tokens,
        max_messages=wire.limits.max_messages,
        default_deadline_s=seconds(wire.limits.default_deadline),
        max_images=wire.limits.max_images,
        max_image_bytes=wire.limits.max_image_bytes,
        max_image_pixels=wire.limits.max_image_pixels,
    )
    models = tuple(_model(model) for model in wire.models)
    return ServiceInfo(
        version=wire.version,
        models=models,
        limits=limits,
        started_at=wire.started_at.ToDatetime(tzinfo=UTC),
        policy_reloads=_reloads(wire.policy_reloads) if wire.HasField("policy_reloads") else None,
        model_reloads=_reloads(wire.model_reloads) if wire.HasField("model_reloads") else None,
    )


def _reloads(wire: guard_pb2.Reloads) -> Reloads:
    problems = tuple(wire.problems) if wire.HasField("failed_at") else ()
    return Reloads(wire.generation, wire.loaded_at.ToDatetime(tzinfo=UTC), problems)


def read_policies(wire: guard_pb2.ListPoliciesResponse) -> PolicyList:
    """Plain Python from the wire."""
    return PolicyList(tuple(_policy(policy) for policy in wire.policies), wire.default_policy)


def _model(wire: guard_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        model=ModelRef(wire.model.name, wire.model.digest, wire.model.tier, wire.model.tier_reason),
        engine=wire.engine,
        template=wire.template,
        categories=tuple(wire.categories),
        judges_images=wire.judges_images,
        custom_categories=wire.custom_categories,
        notice=wire.notice,
        parameters=wire.parameters,
        window_tokens=wire.window_tokens,
    )


def _policy(wire: guard_pb2.PolicySummary) -> PolicySummary:
    return PolicySummary(
        policy=PolicyRef(wire.policy.name, wire.policy.version, wire.policy.digest),
        description=wire.description,
        shadow=wire.shadow,
        categories=tuple(wire.categories),
        on_unavailable_prompt=_declared(wire.on_unavailable_prompt),
        on_unavailable_response=_declared(wire.on_unavailable_response),
        on_unscannable_prompt=_UNSCANNABLE.get(wire.on_unscannable_prompt, Unscannable.BLOCK),
        on_unscannable_response=_UNSCANNABLE.get(wire.on_unscannable_response, Unscannable.BLOCK),
        refusals=tuple(sorted(wire.refusals.items())),
        stream=_stream(wire),
        candidate=_candidate(wire.candidate) if wire.HasField("candidate") else None,
    )


def _stream(wire: guard_pb2.PolicySummary) -> Stream:
    usual = Stream()
    return Stream(
        check_every_chars=wire.check_every_chars or usual.check_every_chars,
        first_check_chars=wire.first_check_chars or usual.first_check_chars,
        sentence_ends=wire.sentence_ends,
        hold_back_chars=wire.hold_back_chars,
    )


def _candidate(wire: guard_pb2.Candidate) -> Candidate:
    wishes = ((_wish(one.action), _wish(one.candidate_action), one.verdicts) for one in wire.wishes)
    return Candidate(wire.policy, wire.share, tuple(wishes))


def _wish(wire: verdict_pb2.Action.ValueType) -> Action | None:
    return None if wire == verdict_pb2.ACTION_UNSPECIFIED else read_action(wire)


def _declared(wire: verdict_pb2.Action.ValueType) -> Action:
    """What a policy declares; nothing declared means block."""
    return Action.BLOCK if wire == verdict_pb2.ACTION_UNSPECIFIED else read_action(wire)
