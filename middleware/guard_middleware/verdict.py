"""What a guard answered, in plain Python: a verdict, or what is done in the absence of one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from google.protobuf.duration_pb2 import Duration

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_middleware.errors import BadReply, GuardError
from guard_policies.assessment import Action, Direction

_ACTIONS = {
    verdict_pb2.ACTION_ALLOW: Action.ALLOW,
    verdict_pb2.ACTION_FLAG: Action.FLAG,
    verdict_pb2.ACTION_BLOCK: Action.BLOCK,
}
_DIRECTIONS = {
    verdict_pb2.DIRECTION_PROMPT: Direction.PROMPT,
    verdict_pb2.DIRECTION_RESPONSE: Direction.RESPONSE,
}


@dataclass(frozen=True, slots=True)
class CategoryResult:
    """Score of one hazard category and what its rule made of it."""

    code: str
    name: str
    score: float
    threshold: float
    fired: bool
    action: Action


@dataclass(frozen=True, slots=True)
class ModelRef:
    """The model that gave the scores; `tier` only with a cascade."""

    name: str
    digest: str
    tier: str = ""
    tier_reason: str = ""


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """The policy that drew the action."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True)
class PartCoverage:
    """What became of a message part; `kind`: "text", "image", "tool_call" or "tool_result".

    `judged` only when all of it was; `image_digest` is of the encoded image that was, whole or in
    part: "sha256:" and hex.
    """

    message_index: int
    part_index: int
    kind: str
    judged: bool
    reason: str
    neutralised: int
    image_digest: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of a long conversation that was judged by itself, in tokens."""

    first_token: int
    end_token: int
    unsafe_score: float
    image_digest: str = ""  # of the image that the model was shown beside it


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the verdict rests on; `complete` when every part of every message was judged."""

    complete: bool
    parts: tuple[PartCoverage, ...]
    windows: tuple[Window, ...]
    conversation_tokens: int

    @property
    def not_judged(self) -> tuple[PartCoverage, ...]:
        """The parts that the model did not see."""
        return tuple(part for part in self.parts if not part.judged)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went, in the service."""

    total_s: float
    queue_s: float
    tokenize_s: float
    inference_s: float
    computed_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A guard's answer for one conversation under one policy."""

    action: Action
    unsafe_score: float
    categories: tuple[CategoryResult, ...]
    direction: Direction
    shadow_action: Action | None
    model: ModelRef
    policy: PolicyRef
    coverage: Coverage
    timing: Timing
    verdict_id: str
    from_cache: bool
    joint: bool
    judged: Literal[True] = field(default=True, init=False)

    @property
    def allowed(self) -> bool:
        """Whether no rule fired."""
        return self.action is Action.ALLOW

    @property
    def blocked(self) -> bool:
        """Whether the message must not pass."""
        return self.action is Action.BLOCK

    @property
    def fired(self) -> tuple[CategoryResult, ...]:
        """The categories whose rule fired, the highest score first."""
        hits = (category for category in self.categories if category.fired)
        return tuple(sorted(hits, key=lambda category: -category.score))

    @property
    def scores(self) -> dict[str, float]:
        """Score of each category by code."""
        return {category.code: category.score for category in self.categories}


@dataclass(frozen=True, slots=True)
class Unjudged:
    """The guard could not judge; `action` is what `on_unavailable` asks for. It has no scores."""

    action: Action
    reason: str
    error: GuardError
    judged: Literal[False] = field(default=False, init=False)

    @property
    def allowed(self) -> bool:
        """Whether the message may pass although nobody judged it."""
        return self.action is Action.ALLOW

    @property
    def blocked(self) -> bool:
        """Whether the message must not pass."""
        return self.action is Action.BLOCK


Outcome = Verdict | Unjudged


@dataclass(frozen=True, slots=True)
class StreamOutcome:
    """An outcome for the first `covered_chars` code points of a growing reply.

    `final` is true for the last one: the verdict on the whole reply, or an Unjudged that ended the
    stream.
    """

    outcome: Outcome
    covered_chars: int
    final: bool


@dataclass(frozen=True, slots=True)
class SeenImage:
    """An outcome for an image that the guard fetched, and the image as it was judged, as a data:
    URI; empty where it had none."""

    outcome: Outcome
    data_url: str = ""


def read_verdict(wire: verdict_pb2.Verdict) -> Verdict:
    """Plain Python from the wire; raises BadReply for what the contract forbids."""
    shadow = None
    if wire.shadow_action != verdict_pb2.ACTION_UNSPECIFIED:
        shadow = read_action(wire.shadow_action)
    if wire.direction not in _DIRECTIONS:
        raise BadReply("the verdict has no direction")
    return Verdict(
        action=read_action(wire.action),
        unsafe_score=_score(wire.unsafe_score),
        categories=tuple(_category(category) for category in wire.categories),
        direction=_DIRECTIONS[wire.direction],
        shadow_action=shadow,
        model=ModelRef(wire.model.name, wire.model.digest, wire.model.tier, wire.model.tier_reason),
        policy=PolicyRef(wire.policy.name, wire.policy.version, wire.policy.digest),
        coverage=_coverage(wire.coverage),
        timing=_timing(wire.timing),
        verdict_id=wire.verdict_id,
        from_cache=wire.from_cache,
        joint=wire.joint,
    )


def read_action(wire: int) -> Action:
    """The action on the wire; raises BadReply for one that this client does not know."""
    if wire not in _ACTIONS:
        raise BadReply("the verdict has no action that this client knows")
    return _ACTIONS[verdict_pb2.Action.ValueType(wire)]


def read_result(wire: guard_pb2.ClassifyResult) -> verdict_pb2.Verdict | guard_pb2.ItemError:
    """The outcome of one item of a batch that is set; raises BadReply when none is."""
    if wire.HasField("verdict"):
        return wire.verdict
    if wire.HasField("error"):
        return wire.error
    raise BadReply("an item of the batch has neither verdict nor error")


def _score(value: float) -> float:
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise BadReply("the verdict holds a score outside [0, 1]")
    return value


def _category(wire: verdict_pb2.CategoryResult) -> CategoryResult:
    return CategoryResult(
        code=wire.code,
        name=wire.name,
        score=_score(wire.score),
        threshold=wire.threshold,
        fired=wire.fired,
        action=read_action(wire.action),
    )


def _coverage(wire: verdict_pb2.Coverage) -> Coverage:
    parts = tuple(
        PartCoverage(
            message_index=part.message_index,
            part_index=part.part_index,
            kind=_kind(part.kind),
            judged=part.state == verdict_pb2.PART_STATE_JUDGED,
            reason=part.reason,
            neutralised=part.neutralised,
            image_digest=part.image_digest,
        )
        for part in wire.parts
    )
    windows = tuple(
        Window(
            window.first_token, window.end_token, _score(window.unsafe_score), window.image_digest
        )
        for window in wire.windows
    )
    return Coverage(wire.complete, parts, windows, wire.conversation_tokens)


def _kind(wire: int) -> str:
    if wire not in verdict_pb2.PartKind.values():
        return "unknown"
    name = verdict_pb2.PartKind.Name(verdict_pb2.PartKind.ValueType(wire))
    return name.removeprefix("PART_KIND_").lower()


def _timing(wire: verdict_pb2.Timing) -> Timing:
    return Timing(
        total_s=seconds(wire.total),
        queue_s=seconds(wire.queue),
        tokenize_s=seconds(wire.tokenize),
        inference_s=seconds(wire.inference),
        computed_tokens=wire.computed_tokens,
        cached_tokens=wire.cached_tokens,
    )


def seconds(wire: Duration) -> float:
    """A duration in seconds."""
    return float(wire.seconds) + wire.nanos * 1e-9
