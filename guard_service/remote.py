"""A guard of another server as the second of a cascade: asked over gRPC, its answer checked."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2
from guard_policies.assessment import Assessment, Direction
from guard_policies.decide import Decision, decide
from guard_policies.schema import Policy
from guard_service import errors
from guard_service.conversation import Conversation, Image, Part
from guard_service.engines import ModelCard
from guard_service.errors import GuardServiceError
from guard_service.moderation import Judgement, direction_of
from guard_service.prompt import BuiltPrompt, PartReport, Prompt
from guard_service.security.whose import WHOSE
from guard_service.tracing import metadata
from guard_service.wire import ACTIONS, DIRECTIONS, KINDS, kind_of, request_of

ENGINE = "remote"
INFO_TIMEOUT_S = 1.0
MAX_REPLY_BYTES = 64 * 2**20  # a verdict is small; the images that were fetched may not be
MOST_TOKENS = 2**31  # so that those of both guards have room in the contract's number
MOST_CHARS = 256  # of a model's name or digest
MIME_TYPE = re.compile(r"image/[a-z0-9.+-]{1,32}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", -1),  # the other server's limit counts
    # gRPC's own pauses between connection attempts (1 s and growing) would outlast our deadlines.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class RemoteGuard:
    """Asks the server at `target` to judge as the second guard: alone, with its own model.

    Its scores count only under the same policy (by digest) and only if they lead to the action that
    it tells: whatever else it answers is no answer. For one event loop.
    """

    card = None

    def __init__(
        self, target: str, ca: Path | None, cert: Path | None = None, key: Path | None = None
    ) -> None:
        """With the CA's certificate (PEM) the channel is a TLS one, and with a certificate of our
        own and its key we show that. Raises OSError for a file that cannot be read."""
        self._target = target
        self._roots = ca.read_bytes() if ca else None
        self._chain = cert.read_bytes() if cert else None
        self._key = key.read_bytes() if key else None

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        """Made in the event loop, where it is asked for first."""
        if self._roots is None:
            return grpc.aio.insecure_channel(self._target, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(self._roots, self._key, self._chain)
        return grpc.aio.secure_channel(self._target, credentials, options=OPTIONS)

    @cached_property
    def _stub(self) -> guard_pb2_grpc.GuardServiceAsyncStub:
        stub: guard_pb2_grpc.GuardServiceAsyncStub = guard_pb2_grpc.GuardServiceStub(self._channel)
        return stub

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def cards(self) -> tuple[ModelCard, ...]:
        """The model that the other server names first; none when it does not answer now."""
        try:
            info = await self._stub.GetInfo(guard_pb2.GetInfoRequest(), timeout=INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return ()
        return tuple(map(_card, info.models[:1]))

    async def judge(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        timeout_s: float,
        no_cache: bool = False,
    ) -> Judgement:
        """Judge the last turn. Raises GuardServiceError when there is no verdict."""
        began = time.perf_counter()
        # There all our tenants are one caller: what one asked must not tell by its cache.
        afresh = no_cache or bool(WHOSE.get())
        request = request_of(conversation, policy.name, language, afresh, as_second=True)
        request.return_images = True
        try:
            reply = await self._stub.Classify(
                request, timeout=max(timeout_s, 0.001), metadata=metadata()
            )
        except grpc.aio.AioRpcError as failed:
            raise error_of(failed) from None
        if reply.verdict.policy.digest != policy.digest:
            raise errors.PolicyNotSupported(
                f"the second guard's policy {policy.name} is another one; give both the same file"
            )
        try:
            return _judgement(reply, conversation, policy, language, began)
        except (ValueError, KeyError):
            raise errors.NotAssessed("the second guard's answer cannot be used") from None


def _judgement(
    reply: guard_pb2.ClassifyResponse,
    conversation: Conversation,
    policy: Policy,
    language: str,
    began: float,
) -> Judgement:
    """What a verdict says, drawn anew from its scores. Raises ValueError where it does not hold."""
    verdict = reply.verdict
    built = _built(verdict, conversation)
    unscannable = not all(part.judged for part in built.parts)
    scores = {one.code: one.score for one in verdict.categories}
    assessment = Assessment(verdict.unsafe_score, scores)
    # Every category of the policy must have a score; others count for nothing.
    decision = decide(policy, assessment, built.direction, language, unscannable)
    if _told(decision) != (verdict.action, verdict.shadow_action):
        raise ValueError("its scores do not lead to its action")
    timing, total_s = verdict.timing, time.perf_counter() - began

    def seconds(duration: Duration) -> float:
        return min(max(duration.ToNanoseconds() / 1e9, 0.0), total_s)

    return Judgement(
        id=uuid.uuid4().hex,
        decision=decision,
        policy=policy,
        model=_model(verdict.model),
        built=built,
        window_scores=tuple(_share(window.unsafe_score) for window in verdict.coverage.windows),
        from_cache=verdict.from_cache,
        total_s=total_s,
        tokenize_s=seconds(timing.tokenize),
        queue_s=seconds(timing.queue),
        inference_s=seconds(timing.inference),
        computed_tokens=min(timing.computed_tokens, MOST_TOKENS),
        cached_tokens=min(timing.cached_tokens, MOST_TOKENS),
        unknown_categories=tuple(
            one.code
            for one in policy.judged(built.direction)
            if one.code in verdict.coverage.unknown_categories
        ),
        found=(decision,),
        assessments=(assessment,),
        conversation=_as_judged(conversation, reply.images, built.parts),
        images_s=seconds(timing.images),
    )


def _told(decision: Decision) -> tuple[int, int]:
    shadow = decision.shadow_action
    return ACTIONS[decision.action], ACTIONS[shadow] if shadow else verdict_pb2.ACTION_UNSPECIFIED


def _built(verdict: verdict_pb2.Verdict, conversation: Conversation) -> BuiltPrompt:
    """What the other server read: every part of the conversation must be accounted for."""
    direction: Direction = direction_of(conversation)
    if verdict.direction != DIRECTIONS[direction]:
        raise ValueError("its direction is not the conversation's")
    coverage = verdict.coverage
    parts = tuple(map(_part, coverage.parts))
    sent = [
        (at, inner, kind_of(part))
        for at, message in enumerate(conversation.messages)
        for inner, part in enumerate(message.parts)
    ]
    if [(one.message_index, one.part_index, one.kind) for one in parts] != sent:
        raise ValueError("its parts are not the conversation's")
    windows = tuple((one.first_token, one.end_token) for one in coverage.windows)
    prompts = tuple(  # of which no more is known than the image
        Prompt(direction, (), (), (), Image(digest=digest) if digest else None)
        for digest in (_digest(one.image_digest) for one in coverage.windows)
    )
    return BuiltPrompt(prompts, windows, coverage.conversation_tokens, direction, parts)


def _as_judged(
    conversation: Conversation,
    images: Iterable[guard_pb2.FetchedImage],
    parts: Iterable[PartReport],
) -> Conversation:
    """With the bytes that the other server fetched. Raises ValueError for an image given by address
    that it judged and did not give back: nobody would know which one that was."""
    digests = {(one.message_index, one.part_index): one.digest for one in parts}
    fetched = {(one.message_index, one.part_index): one for one in images}

    def ready(part: Part, place: tuple[int, int]) -> Part:
        digest = digests[place]
        if not isinstance(part, Image) or part.data is not None or not digest:
            return part
        found = fetched.get(place)
        if found is None or f"sha256:{hashlib.sha256(found.data).hexdigest()}" != digest:
            raise ValueError("an image that it judged is not there")
        mime_type = found.mime_type if MIME_TYPE.fullmatch(found.mime_type) else ""
        return replace(part, data=found.data, mime_type=mime_type, digest=digest)

    return Conversation(
        tuple(
            replace(
                message,
                parts=tuple(ready(part, (at, i)) for i, part in enumerate(message.parts)),
            )
            for at, message in enumerate(conversation.messages)
        )
    )


def _part(part: verdict_pb2.PartCoverage) -> PartReport:
    kind = {number: kind for kind, number in KINDS.items()}[part.kind]
    judged = part.state == verdict_pb2.PART_STATE_JUDGED
    return PartReport(
        part.message_index,
        part.part_index,
        kind,
        judged,
        reason=part.reason if REASON.fullmatch(part.reason) else "",
        neutralised=part.neutralised,
        partly=part.state == verdict_pb2.PART_STATE_PARTLY_JUDGED,
        digest=_digest(part.image_digest),
    )


def _digest(text: str) -> str:
    return text if DIGEST.fullmatch(text) else ""


def _share(score: float) -> float:
    if not 0.0 <= score <= 1.0:  # NaN compares false
        raise ValueError("a score is not a probability")
    return score


def _model(model: verdict_pb2.ModelRef) -> ModelCard:
    """As much of a card as a verdict tells. Raises ValueError for what cannot be a name."""
    if max(len(model.name), len(model.digest)) > MOST_CHARS:
        raise ValueError("its model's name is too long")
    return _card(guard_pb2.ModelInfo(model=model, engine=ENGINE))


def _card(info: guard_pb2.ModelInfo) -> ModelCard:
    return ModelCard(
        name=info.model.name,
        digest=info.model.digest,
        engine=info.engine,
        template=info.template,
        categories=tuple(info.categories),
        custom_categories=info.custom_categories,
        judges_images=info.judges_images,
        window_tokens=info.window_tokens,
        parameters=info.parameters,
        notice=info.notice,
        custom_codes=tuple(info.custom_codes),
    )


def error_of(failed: grpc.aio.AioRpcError) -> GuardServiceError:
    """What a failed call means here. Nothing of the other server's own words is passed on."""
    reason, retry_after_s = _details(failed)
    match failed.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return errors.NotReady("the second guard is away or not ready")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded("the second guard did not answer in time")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if reason == errors.Overloaded.reason:
            return errors.Overloaded("the second guard is overloaded; retry later", retry_after_s)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own, of a message over its size
            return errors.ConversationTooLong("the second guard takes no conversation that large")
        case grpc.StatusCode.INVALID_ARGUMENT if reason == errors.ConversationTooLong.reason:
            return errors.ConversationTooLong("the conversation is too long for the second guard")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return errors.InvalidRequest("the second guard refuses the conversation")
        case grpc.StatusCode.FAILED_PRECONDITION if reason == errors.Unscannable.reason:
            return errors.Unscannable("the second guard cannot judge a part of the conversation")
        case (
            grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.NOT_FOUND
            | grpc.StatusCode.UNIMPLEMENTED
            | grpc.StatusCode.UNAUTHENTICATED
            | grpc.StatusCode.PERMISSION_DENIED
        ):
            return errors.PolicyNotSupported("the second guard does not serve the policy")
        case _:
            return errors.NotAssessed("the second guard failed on this request")


def _details(failed: grpc.aio.AioRpcError) -> tuple[str, float]:
    """Reason and retry delay of a status; empty and a moment where it has none that is sound."""
    reason, retry_after_s = "", 1.0
    raw: Any = dict(failed.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == errors.DOMAIN:
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after_s = min(max(retry.retry_delay.ToTimedelta().total_seconds(), 0.0), 30.0)
    except (DecodeError, OverflowError, ValueError, TypeError):
        pass
    return reason, retry_after_s
