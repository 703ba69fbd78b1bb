"""The contract's five calls: from the wire to the domain and back; no decision is taken here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_service import __version__
from guard_service.audit.recording import Recorder
from guard_service.cascade import FIRST, SECOND
from guard_service.config import Settings
from guard_service.errors import BatchTooLarge, GuardServiceError, InternalError
from guard_service.interceptors import CALL
from guard_service.judging import Judge, Judges
from guard_service.live.reloads import Reloads
from guard_service.moderation import Judgement
from guard_service.security.tenant_judge import TenantJudges
from guard_service.stream import StreamBounds, judged
from guard_service.wire import (
    Sizes,
    conversation_of,
    duration_of,
    fetched_of,
    item_error_of,
    model_info_of,
    policy_summary_of,
    reloads_of,
    verdict_of,
)

LOG = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Servicer(guard_pb2_grpc.GuardServiceServicer):
    """GuardService."""

    judges: Judges
    settings: Settings
    started_at: Timestamp
    policy_reloads: Reloads | None = None
    model_reloads: Reloads | None = None
    recorder: Recorder | None = None

    async def Classify(
        self, request: guard_pb2.ClassifyRequest, context: Context
    ) -> guard_pb2.ClassifyResponse:
        """Judge the last turn of one conversation."""
        with self._theirs.held() as judge:
            judgement = await self._judge(judge, request, self._timeout_s(context))
        images = fetched_of(judgement) if request.return_images else ()
        return guard_pb2.ClassifyResponse(verdict=verdict_of(judgement), images=images)

    async def ClassifyBatch(
        self, request: guard_pb2.ClassifyBatchRequest, context: Context
    ) -> guard_pb2.ClassifyBatchResponse:
        """Judge many, item by item, all by the same policies and models: one that fails does not
        fail the others."""
        limit = self._max_batch_items
        if len(request.requests) > limit:
            raise BatchTooLarge(f"{len(request.requests)} requests are over the limit of {limit}")
        timeout_s = self._timeout_s(context)
        with self._theirs.held() as judge:
            results = await asyncio.gather(
                *(self._item(judge, item, timeout_s) for item in request.requests)
            )
        return guard_pb2.ClassifyBatchResponse(results=results)

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[guard_pb2.ClassifyStreamRequest], context: Context
    ) -> AsyncIterator[guard_pb2.ClassifyStreamResponse]:
        """Judge a reply while it grows."""
        settings = self.settings
        bounds = StreamBounds(self._sizes, settings.max_conversation_chars, settings.stream_idle_s)
        verdicts = judged(request_iterator, self._theirs, bounds, lambda: self._timeout_s(context))
        async with aclosing(verdicts):  # a caller who is gone holds nothing any more
            async for covered in verdicts:
                CALL.get().note(covered.judgement)
                yield guard_pb2.ClassifyStreamResponse(
                    verdict=verdict_of(covered.judgement),
                    covered_chars=covered.chars,
                    final=covered.final,
                )

    async def ListPolicies(
        self, request: guard_pb2.ListPoliciesRequest, context: Context
    ) -> guard_pb2.ListPoliciesResponse:
        """The policies that requests may name."""
        with self._theirs.held() as judge:
            policies = sorted(judge.policies.items())
            return guard_pb2.ListPoliciesResponse(
                policies=[policy_summary_of(one, judge.compared(one)) for _, one in policies],
                default_policy=judge.default_policy,
            )

    async def GetInfo(
        self, request: guard_pb2.GetInfoRequest, context: Context
    ) -> guard_pb2.GetInfoResponse:
        """What is running."""
        settings = self.settings
        with self._theirs.held() as judge:
            cards = await judge.cards()
        tiers = (FIRST, SECOND) if len(cards) > 1 else ("",)
        sees = any(card.judges_images for card in cards)
        return guard_pb2.GetInfoResponse(
            version=__version__,
            models=[model_info_of(card, tier) for card, tier in zip(cards, tiers, strict=True)],
            limits=guard_pb2.Limits(
                max_message_bytes=settings.max_message_bytes,
                max_batch_items=self._max_batch_items,
                max_conversation_tokens=settings.max_conversation_tokens,
                max_messages=settings.max_messages,
                default_deadline=duration_of(settings.default_deadline_s),
                max_images=settings.max_images if sees else 0,
                max_image_bytes=settings.max_image_bytes if sees else 0,
                max_image_pixels=settings.max_image_pixels if sees else 0,
            ),
            started_at=self.started_at,
            policy_reloads=reloads_of(self.policy_reloads) if self.policy_reloads else None,
            model_reloads=reloads_of(self.model_reloads) if self.model_reloads else None,
        )

    async def _judge(
        self, judge: Judge, request: guard_pb2.ClassifyRequest, timeout_s: float
    ) -> Judgement:
        policy = judge.policy(request.policy, request.as_second)
        conversation = conversation_of(request.conversation, self._sizes)
        judgement = await judge.judge(
            conversation, policy, request.language, timeout_s, request.no_cache
        )
        CALL.get().note(judgement)
        return judgement

    async def _item(
        self, judge: Judge, request: guard_pb2.ClassifyRequest, timeout_s: float
    ) -> guard_pb2.ClassifyResult:
        try:
            judgement = await self._judge(judge, request, timeout_s)
            return guard_pb2.ClassifyResult(verdict=verdict_of(judgement))
        except GuardServiceError as refused:
            error = refused
        except Exception:
            LOG.exception("a batch item failed")
            error = InternalError("a defect of the service; its logs tell more")
        if self.recorder is not None:
            await self.recorder.refused(error)
        return guard_pb2.ClassifyResult(error=item_error_of(error))

    @property
    def _theirs(self) -> Judges:
        """Judges as whoever calls meets them."""
        caller = CALL.get().caller
        return self.judges if caller is None else TenantJudges(self.judges, caller.usage)

    @property
    def _max_batch_items(self) -> int:
        caller, most = CALL.get().caller, self.settings.max_batch_items
        return most if caller is None else int(min(most, caller.usage.tenant.bounds.batch_items))

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.settings.max_messages, self.settings.max_parts)

    def _timeout_s(self, context: Context) -> float:
        remaining = context.time_remaining()
        if remaining is None:
            return self.settings.default_deadline_s
        return min(max(remaining, 0.0), self.settings.max_deadline_s)
