"""Messages of the contract to domain types and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_policies.assessment import Action, Direction
from guard_policies.schema import Mode, Policy, Unscannable
from guard_service.conversation import (
    Conversation,
    Image,
    Message,
    Part,
    Role,
    Text,
    ToolCall,
    ToolResult,
)
from guard_service.engines import ModelCard
from guard_service.errors import GuardServiceError, InvalidRequest
from guard_service.live.reloads import Reloads
from guard_service.moderation import Judgement
from guard_service.prompt import PartReport

ROLE_NUMBERS = {
    Role.USER: guard_pb2.ROLE_USER,
    Role.ASSISTANT: guard_pb2.ROLE_ASSISTANT,
    Role.SYSTEM: guard_pb2.ROLE_SYSTEM,
    Role.TOOL: guard_pb2.ROLE_TOOL,
}
ROLES: Mapping[int, Role] = {number: role for role, number in ROLE_NUMBERS.items()}
ON_UNSCANNABLE = {
    Unscannable.ALLOW: guard_pb2.ON_UNSCANNABLE_ALLOW,
    Unscannable.FLAG: guard_pb2.ON_UNSCANNABLE_FLAG,
    Unscannable.BLOCK: guard_pb2.ON_UNSCANNABLE_BLOCK,
    Unscannable.ERROR: guard_pb2.ON_UNSCANNABLE_ERROR,
}
ACTIONS = {
    Action.ALLOW: verdict_pb2.ACTION_ALLOW,
    Action.FLAG: verdict_pb2.ACTION_FLAG,
    Action.BLOCK: verdict_pb2.ACTION_BLOCK,
}
DIRECTIONS = {
    Direction.PROMPT: verdict_pb2.DIRECTION_PROMPT,
    Direction.RESPONSE: verdict_pb2.DIRECTION_RESPONSE,
}
KINDS = {
    "text": verdict_pb2.PART_KIND_TEXT,
    "image": verdict_pb2.PART_KIND_IMAGE,
    "tool_call": verdict_pb2.PART_KIND_TOOL_CALL,
    "tool_result": verdict_pb2.PART_KIND_TOOL_RESULT,
}


Compared = Mapping[tuple[Action | None, Action | None], int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many messages and parts a conversation may have."""

    messages: int
    parts: int


def conversation_of(message: guard_pb2.Conversation, sizes: Sizes) -> Conversation:
    """The conversation; raises InvalidRequest that names the place and what to do."""
    if not message.messages:
        raise InvalidRequest("conversation.messages: is empty; send at least one message")
    if len(message.messages) > sizes.messages:
        raise InvalidRequest(
            f"conversation.messages: {len(message.messages)} are over the limit of {sizes.messages}"
        )
    parts = sum(len(turn.parts) for turn in message.messages)
    if parts > sizes.parts:
        raise InvalidRequest(f"conversation: {parts} parts are over the limit of {sizes.parts}")
    return Conversation(tuple(_message(turn, i) for i, turn in enumerate(message.messages)))


def _message(message: guard_pb2.Message, index: int) -> Message:
    place = f"conversation.messages[{index}]"
    role = ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(f"{place}.role: must be user, assistant, system or tool")
    if not message.parts:
        raise InvalidRequest(f"{place}.parts: is empty; send at least one part")
    return Message(
        role, tuple(_part(p, role, f"{place}.parts[{i}]") for i, p in enumerate(message.parts))
    )


def _part(part: guard_pb2.Part, role: Role, place: str) -> Part:
    match part.WhichOneof("content"):
        case "text":
            return Text(part.text)
        case "image":
            return _image(part.image, place)
        case "tool_call" if role is not Role.ASSISTANT:
            raise InvalidRequest(f"{place}.tool_call: belongs in messages of the assistant only")
        case "tool_call":
            call = part.tool_call
            return ToolCall(call.name, call.arguments, call.id)
        case "tool_result":
            return ToolResult(part.tool_result.text, part.tool_result.tool_call_id)
        case _:
            raise InvalidRequest(
                f"{place}.content: is not set, or of a kind that this server does not know"
            )


def _image(image: guard_pb2.Image, place: str) -> Image:
    match image.WhichOneof("source"):
        case "data":
            return Image(data=image.data, mime_type=image.mime_type)
        case "uri":
            return Image(uri=image.uri, mime_type=image.mime_type)
        case _:
            raise InvalidRequest(f"{place}.image.source: is not set; send data or uri")


def kind_of(part: Part) -> str:
    """The kind of a part, as coverage names it."""
    match part:
        case Text():
            return "text"
        case Image():
            return "image"
        case ToolCall():
            return "tool_call"
        case ToolResult():
            return "tool_result"


def message_of(conversation: Conversation) -> guard_pb2.Conversation:
    """The conversation as the contract has it: what `conversation_of` reads."""
    return guard_pb2.Conversation(
        messages=[
            guard_pb2.Message(role=ROLE_NUMBERS[turn.role], parts=map(_part_message, turn.parts))
            for turn in conversation.messages
        ]
    )


def request_of(
    conversation: Conversation, policy: str, language: str, no_cache: bool, as_second: bool
) -> guard_pb2.ClassifyRequest:
    """What asks a server to judge the conversation."""
    return guard_pb2.ClassifyRequest(
        conversation=message_of(conversation),
        policy=policy,
        language=language,
        no_cache=no_cache,
        as_second=as_second,
    )


def _part_message(part: Part) -> guard_pb2.Part:
    match part:
        case Text():
            return guard_pb2.Part(text=part.text)
        case Image():
            image = guard_pb2.Image(mime_type=part.mime_type)
            if part.data is not None:
                image.data = part.data
            elif part.uri is not None:
                image.uri = part.uri
            return guard_pb2.Part(image=image)
        case ToolCall():
            call = guard_pb2.ToolCall(name=part.name, arguments=part.arguments, id=part.id)
            return guard_pb2.Part(tool_call=call)
        case ToolResult():
            result = guard_pb2.ToolResult(text=part.text, tool_call_id=part.tool_call_id)
            return guard_pb2.Part(tool_result=result)


def verdict_of(judgement: Judgement) -> verdict_pb2.Verdict:
    """The verdict as the contract has it."""
    decision, built = judgement.decision, judgement.built
    verdict = verdict_pb2.Verdict(
        action=ACTIONS[decision.action],
        unsafe_score=decision.unsafe_score,
        categories=[
            verdict_pb2.CategoryResult(
                code=outcome.category.code,
                name=outcome.category.name,
                score=outcome.score,
                threshold=outcome.threshold,
                fired=outcome.fired,
                action=ACTIONS[outcome.action],
            )
            for outcome in decision.outcomes
        ],
        direction=DIRECTIONS[built.direction],
        model=verdict_pb2.ModelRef(
            name=judgement.model.name,
            digest=judgement.model.digest,
            tier=judgement.tier,
            tier_reason=judgement.tier_reason,
        ),
        policy=policy_ref_of(judgement.policy),
        coverage=_coverage(judgement),
        timing=_timing(judgement),
        verdict_id=judgement.id,
        from_cache=judgement.from_cache,
        joint=decision.joint,
    )
    if decision.shadow_action is not None:
        verdict.shadow_action = ACTIONS[decision.shadow_action]
    return verdict


def _coverage(judgement: Judgement) -> verdict_pb2.Coverage:
    built = judgement.built
    shown = (prompt.image.digest if prompt.image else "" for prompt in built.prompts)
    return verdict_pb2.Coverage(
        complete=all(part.judged for part in built.parts),
        parts=[_part_coverage(part) for part in built.parts],
        windows=[
            verdict_pb2.Window(
                first_token=first, end_token=end, unsafe_score=score, image_digest=digest
            )
            for (first, end), score, digest in zip(
                built.windows,
                judgement.window_scores,
                shown,
                strict=True,
            )
        ],
        conversation_tokens=built.conversation_tokens,
        unknown_categories=judgement.unknown_categories,
    )


def _part_coverage(part: PartReport) -> verdict_pb2.PartCoverage:
    state = verdict_pb2.PART_STATE_JUDGED if part.judged else verdict_pb2.PART_STATE_NOT_JUDGED
    if part.partly:
        state = verdict_pb2.PART_STATE_PARTLY_JUDGED
    return verdict_pb2.PartCoverage(
        message_index=part.message_index,
        part_index=part.part_index,
        kind=KINDS[part.kind],
        state=state,
        reason=part.reason,
        neutralised=part.neutralised,
        image_digest=part.digest,
    )


def fetched_of(judgement: Judgement) -> Iterator[guard_pb2.FetchedImage]:
    """The images that were given by address, with the bytes that were judged."""
    for message_index, message in enumerate(judgement.conversation.messages):
        for part_index, part in enumerate(message.parts):
            if isinstance(part, Image) and part.uri is not None and part.digest:
                yield guard_pb2.FetchedImage(
                    message_index=message_index,
                    part_index=part_index,
                    data=part.data or b"",
                    mime_type=part.mime_type,
                )


def _timing(judgement: Judgement) -> verdict_pb2.Timing:
    return verdict_pb2.Timing(
        total=duration_of(judgement.total_s),
        queue=duration_of(judgement.queue_s),
        tokenize=duration_of(judgement.tokenize_s),
        inference=duration_of(judgement.inference_s),
        computed_tokens=judgement.computed_tokens,
        cached_tokens=judgement.cached_tokens,
        images=duration_of(judgement.images_s),
    )


def duration_of(seconds: float) -> Duration:
    """A protobuf Duration."""
    whole, nanos = divmod(int(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def policy_ref_of(policy: Policy) -> verdict_pb2.PolicyRef:
    """What names and pins a policy."""
    return verdict_pb2.PolicyRef(name=policy.name, version=policy.version, digest=policy.digest)


def _candidate_of(policy: Policy, compared: Compared) -> guard_pb2.Candidate | None:
    if policy.candidate is None:
        return None
    return guard_pb2.Candidate(
        policy=policy.candidate.of,
        share=policy.candidate.share,
        wishes=[
            guard_pb2.Wishes(
                action=ACTIONS[action] if action else verdict_pb2.ACTION_UNSPECIFIED,
                candidate_action=ACTIONS[other] if other else verdict_pb2.ACTION_UNSPECIFIED,
                verdicts=count,
            )
            for (action, other), count in compared.items()
        ],
    )


def policy_summary_of(
    policy: Policy, compared: Compared = MappingProxyType({})
) -> guard_pb2.PolicySummary:
    """What a policy is for, and how it compares with another (Judge.compared)."""
    return guard_pb2.PolicySummary(
        policy=policy_ref_of(policy),
        description=policy.description,
        shadow=policy.mode is Mode.SHADOW,
        categories=[category.code for category in policy.categories],
        on_unavailable_prompt=ACTIONS[policy.on_unavailable(Direction.PROMPT)],
        on_unavailable_response=ACTIONS[policy.on_unavailable(Direction.RESPONSE)],
        on_unscannable_prompt=ON_UNSCANNABLE[policy.on_unscannable(Direction.PROMPT)],
        on_unscannable_response=ON_UNSCANNABLE[policy.on_unscannable(Direction.RESPONSE)],
        refusals=policy.refusals,
        check_every_chars=policy.stream.check_every_chars,
        first_check_chars=policy.stream.first_check_chars,
        sentence_ends=policy.stream.sentence_ends,
        hold_back_chars=policy.stream.hold_back_chars,
        candidate=_candidate_of(policy, compared),
    )


def model_info_of(card: ModelCard, tier: str = "") -> guard_pb2.ModelInfo:
    """What a loaded model is, and its tier in a cascade."""
    return guard_pb2.ModelInfo(
        model=verdict_pb2.ModelRef(name=card.name, digest=card.digest, tier=tier),
        engine=card.engine,
        template=card.template,
        categories=card.categories,
        judges_images=card.judges_images,
        custom_categories=card.custom_categories,
        custom_codes=card.custom_codes,
        notice=card.notice,
        parameters=card.parameters,
        window_tokens=card.window_tokens,
    )


def reloads_of(reloads: Reloads) -> guard_pb2.Reloads:
    """How exchanging policies or models has gone."""
    found = guard_pb2.Reloads(generation=reloads.generation, problems=reloads.places)
    found.loaded_at.FromNanoseconds(reloads.loaded_ns)
    if reloads.failed_ns is not None:
        found.failed_at.FromNanoseconds(reloads.failed_ns)
    return found


def item_error_of(error: GuardServiceError) -> guard_pb2.ItemError:
    """A status inside an OK reply."""
    return guard_pb2.ItemError(
        code=error.code_number, reason=error.reason_value, message=str(error)
    )
