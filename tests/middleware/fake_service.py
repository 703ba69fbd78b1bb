"""A guard on a real socket that answers what a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2


def verdict(
    action: verdict_pb2.Action.ValueType = verdict_pb2.ACTION_ALLOW, score: float = 0.01
) -> verdict_pb2.Verdict:
    """A verdict with two categories."""
    made = verdict_pb2.Verdict(
        action=action,
        unsafe_score=score,
        direction=verdict_pb2.DIRECTION_PROMPT,
        model=verdict_pb2.ModelRef(name="fake", digest="sha256:00"),
        policy=verdict_pb2.PolicyRef(name="default", version="1", digest="sha256:11"),
        coverage=verdict_pb2.Coverage(complete=True, conversation_tokens=3),
        verdict_id="v1",
    )
    made.coverage.parts.add(kind=verdict_pb2.PART_KIND_TEXT, state=verdict_pb2.PART_STATE_JUDGED)
    for code, share in (("S1", 0.25), ("S10", 0.75)):
        made.categories.add(
            code=code,
            name=f"Name of {code}",
            score=score * share,
            threshold=0.5,
            fired=score * share >= 0.5,
            action=verdict_pb2.ACTION_BLOCK,
        )
    made.timing.total.FromMilliseconds(5)
    made.timing.inference.FromMilliseconds(4)
    return made


@dataclass
class Refusal:
    """A status with google.rpc details, as the service sends it."""

    code: grpc.StatusCode
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    details: str = "refused"

    def abort(self, context: grpc.ServicerContext) -> NoReturn:
        """End the call with this status."""
        status = status_pb2.Status(code=self.code.value[0], message=self.details)
        if self.reason:
            status.details.append(
                _packed(
                    error_details_pb2.ErrorInfo(
                        reason=self.reason, domain="guard_api.v1", metadata=self.metadata
                    )
                )
            )
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            status.details.append(_packed(retry))
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(self.code, self.details)


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


Answer = verdict_pb2.Verdict | Refusal
Answerer = Callable[[guard_pb2.ClassifyRequest], Answer]


class FakeService(guard_pb2_grpc.GuardServiceServicer):
    """Keeps what it was asked; answers from a script first, then with `answer`."""

    def __init__(self, *script: Answer, answer: Answerer | None = None) -> None:
        self.script = list(script)
        self.answer = answer or (lambda request: verdict())
        self.asked: list[guard_pb2.ClassifyRequest] = []
        self.batches: list[list[str]] = []
        self.batches_refused: list[Refusal | None] = []
        self.deadlines_s: list[float] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._lock = threading.Lock()

    def Classify(
        self, request: guard_pb2.ClassifyRequest, context: grpc.ServicerContext
    ) -> guard_pb2.ClassifyResponse:
        with self._lock:
            self.asked.append(request)
            self.deadlines_s.append(context.time_remaining())
            self.metadata.append({key: value for key, value in context.invocation_metadata()})
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            answer = self.script.pop(0) if self.script else None
        try:
            answer = answer or self.answer(request)
            if isinstance(answer, Refusal):
                answer.abort(context)
            return guard_pb2.ClassifyResponse(verdict=answer)
        finally:
            with self._lock:
                self.in_flight -= 1

    def ClassifyBatch(
        self, request: guard_pb2.ClassifyBatchRequest, context: grpc.ServicerContext
    ) -> guard_pb2.ClassifyBatchResponse:
        self.batches.append(
            [one.conversation.messages[-1].parts[0].text for one in request.requests]
        )
        if self.batches_refused and (refusal := self.batches_refused.pop(0)):
            refusal.abort(context)
        reply = guard_pb2.ClassifyBatchResponse()
        for one in request.requests:
            answer = self.script.pop(0) if self.script else self.answer(one)
            if isinstance(answer, Refusal):
                error = guard_pb2.ItemError(code=answer.code.value[0], message=answer.details)
                reply.results.add(error=error)
            else:
                reply.results.add(verdict=answer)
        return reply

    def ClassifyStream(
        self,
        request_iterator: Iterator[guard_pb2.ClassifyStreamRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[guard_pb2.ClassifyStreamResponse]:
        covered = 0
        for step in request_iterator:
            covered += len(step.piece.text)
            if step.piece.check or step.piece.end:
                answer = self.script.pop(0) if self.script else verdict()
                if isinstance(answer, Refusal):
                    answer.abort(context)
                yield guard_pb2.ClassifyStreamResponse(
                    verdict=answer, covered_chars=covered, final=step.piece.end
                )

    def ListPolicies(
        self, request: guard_pb2.ListPoliciesRequest, context: grpc.ServicerContext
    ) -> guard_pb2.ListPoliciesResponse:
        reply = guard_pb2.ListPoliciesResponse(default_policy="default")
        reply.policies.add(
            policy=verdict_pb2.PolicyRef(name="default", version="1", digest="sha256:11"),
            description="The usual one.",
            categories=["S1", "S10"],
            on_unavailable_prompt=verdict_pb2.ACTION_FLAG,
            on_unavailable_response=verdict_pb2.ACTION_BLOCK,
        )
        return reply

    def GetInfo(
        self, request: guard_pb2.GetInfoRequest, context: grpc.ServicerContext
    ) -> guard_pb2.GetInfoResponse:
        reply = guard_pb2.GetInfoResponse(version="9.9.9")
        reply.models.add(
            model=verdict_pb2.ModelRef(name="fake", digest="sha256:00"),
            engine="fake",
            template="compact",
            categories=["S1", "S10"],
            notice="This is a starter guard.",
            parameters=7,
            window_tokens=64,
        )
        reply.limits.max_batch_items = 8
        reply.limits.default_deadline.FromSeconds(10)
        reply.started_at.FromSeconds(1_700_000_000)
        return reply


@contextmanager
def serving(
    service: FakeService,
    address: str,
    *,
    credentials: grpc.ServerCredentials | None = None,
    workers: int = 16,
) -> Iterator[str]:
    """Serve on `address` ("unix:/path" or "localhost:0") and yield the target to dial."""
    server = grpc.server(futures.ThreadPoolExecutor(workers))
    guard_pb2_grpc.add_GuardServiceServicer_to_server(service, server)
    states = health.HealthServicer()
    states.set("guard_api.v1.GuardService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield address if address.startswith("unix:") else f"localhost:{port}"
    finally:
        server.stop(None).wait()


def socket_in(folder: Path) -> str:
    """An address for a private socket in a test's folder."""
    return f"unix:{folder / 'guard.sock'}"
