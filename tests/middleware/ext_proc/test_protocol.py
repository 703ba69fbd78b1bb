"""What the processor answers to Envoy's messages, in order and out of it, without an Envoy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.ext_proc.service import Processor
from guard_middleware.guards import Guard
from guard_middleware.metrics import Metrics
from guard_middleware.settings import Settings, SettingsError
from guard_middleware.testing import FakeGuard, forbids
from guard_policies.assessment import Action
from tests.middleware.formats.openai_replies import PATH, asking, reply
from tests.middleware.wrapped import BAD

STREAMED = pb.BODY_SEND_MODE_STREAMED
BUFFERED = pb.BODY_SEND_MODE_BUFFERED
DUPLEX = pb.BODY_SEND_MODE_FULL_DUPLEX_STREAMED
MODES = {"STREAMED": STREAMED, "BUFFERED": BUFFERED, "FULL_DUPLEX_STREAMED": DUPLEX}
ASKED = json.dumps(asking("Hi")).encode()
WHOLE = json.dumps(reply("Hello there.")).encode()
Message = pb.ProcessingRequest

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Aborted(Exception):
    """The stream ended with an error: Envoy refuses the exchange."""


class Wire:
    """Envoy's end of a stream: what it sends, one by one, and what it got. `gap` is awaited before
    each message."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self.got: list[pb.ProcessingResponse] = []
        self.status: grpc.StatusCode | None = None
        self.problem = ""
        self._messages = list(messages)

    async def read(self) -> object:
        for _ in range(20):  # whoever has something to say says it first
            await asyncio.sleep(0)
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, answer: pb.ProcessingResponse) -> None:
        self.got.append(answer)

    async def abort(self, status: grpc.StatusCode, problem: str) -> None:
        self.status, self.problem = status, problem
        raise Aborted

    @property
    def parts(self) -> list[str]:
        return [str(answer.WhichOneof("response")) for answer in self.got]


def headers(**told: str) -> pb.HeaderMap:
    named = {name.replace("_", "-"): value for name, value in told.items()}
    pseudo = {name.removeprefix("-"): value for name, value in named.items()}
    return pb.HeaderMap(
        headers=[
            pb.HeaderValue(key=name, raw_value=value.encode()) for name, value in pseudo.items()
        ]
    )


def head(mode: int = DUPLEX, path: str = PATH, ends: bool = False, method: str = "POST") -> Message:
    told = [(":method", method), (":path", path), (":authority", "envoy"), ("x-own", "1")]
    given_ = [pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in told if value]
    config = pb.ProtocolConfiguration(request_body_mode=mode, response_body_mode=mode)  # type: ignore[arg-type]
    part = pb.HttpHeaders(headers=pb.HeaderMap(headers=given_), end_of_stream=ends)
    return Message(request_headers=part, protocol_config=config)


def body(data: bytes, last: bool = True) -> Message:
    return Message(request_body=pb.HttpBody(body=data, end_of_stream=last))


def reply_head(status: str = "200", kind: str = "application/json", ends: bool = False) -> Message:
    told = [(":status", status), ("content-type", kind), ("content-length", "5")]
    given_ = [pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in told]
    part = pb.HttpHeaders(headers=pb.HeaderMap(headers=given_), end_of_stream=ends)
    return Message(response_headers=part)


def reply_body(data: bytes, last: bool = True) -> Message:
    return Message(response_body=pb.HttpBody(body=data, end_of_stream=last))


def processor(guard: Guard | None = None, **given_: object) -> Processor:
    chosen = Settings(**{"guarded": ("/",), **given_})  # type: ignore[arg-type]
    return Processor(chosen, guard or FakeGuard(forbids(BAD)), Metrics(CollectorRegistry()))


async def told(*messages: Message, by: Processor | None = None) -> Wire:
    """What becomes of a stream of these messages."""
    wire = Wire(messages)
    serving = by or processor()
    try:
        async with asyncio.timeout(60):
            await serving.process(None, wire)  # type: ignore[arg-type]
    except Aborted:
        pass
    finally:
        await serving.close()
    return wire


def streamed(wire: Wire, part: str) -> bytes:
    """The body that went on."""
    bodies = (getattr(one, part).response for one in wire.got if one.WhichOneof("response") == part)
    return b"".join(
        one.body_mutation.streamed_response.body or one.body_mutation.body for one in bodies
    )


@every_mode
async def test_exchange_goes_on_as_it_was_judged(mode: int) -> None:
    wire = await told(head(mode), body(ASKED), reply_head(), reply_body(WHOLE))
    assert wire.status is None
    assert sorted(wire.parts) == sorted(
        ["request_headers", "request_body", "response_headers", "response_body"]
    )
    assert json.loads(streamed(wire, "request_body")) == asking("Hi")
    assert streamed(wire, "response_body") == WHOLE


async def test_streamed_mode_answers_each_chunk_with_one(mode: int = STREAMED) -> None:
    cut = [ASKED[:10], ASKED[10:20], ASKED[20:]]
    said = [WHOLE[:30], WHOLE[30:60], WHOLE[60:]]
    wire = await told(
        head(mode),
        *(body(data, last=data is cut[-1]) for data in cut),
        reply_head(),
        *(reply_body(data, last=data is said[-1]) for data in said),
    )
    assert wire.parts == [
        *("request_headers", "request_body", "request_body", "request_body"),
        *("response_headers", "response_body", "response_body", "response_body"),
    ]
    assert [one.request_body.response.body_mutation.WhichOneof("mutation") for one in wire.got][
        1:4
    ] == ["clear_body", "clear_body", "body"]
    assert streamed(wire, "response_body") == WHOLE


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([body(ASKED)], "request_header_mode SEND"),
        ([Message()], "request_header_mode SEND"),
        ([head(), head()], "two requests"),
        ([head(), Message()], "without a part"),
        ([head(), body(ASKED), body(b"more")], "behind its end"),
        ([head(ends=True), body(ASKED)], "behind its end"),
        ([head(), body(ASKED), reply_body(WHOLE)], "response_header_mode SEND"),
        ([head(), body(ASKED), reply_head(), reply_head()], "two replies"),
        ([head(BUFFERED), body(ASKED), body(ASKED)], "two bodies"),
        ([head(), body(ASKED), Message(response_trailers=pb.HttpTrailers())], "out of order"),
        ([head(pb.BODY_SEND_MODE_GRPC), body(ASKED)], "request_body_mode GRPC"),
        ([head(9), body(ASKED)], "request_body_mode 9"),
        ([Message(request_headers=head().request_headers)], "protocol_config"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
async def test_what_is_out_of_order_ends_the_stream_with_an_error(
    messages: list[Message], problem: str
) -> None:
    """Never without one: Envoy would let the rest pass."""

    def gate() -> asyncio.Future[None]:  # no verdict ends the exchange before
        return asyncio.get_running_loop().create_future()

    guard = FakeGuard(gate=gate) if messages[0].HasField("request_headers") else None
    wire = await told(*messages, by=processor(guard if "two re" not in problem else None))
    assert wire.status is grpc.StatusCode.FAILED_PRECONDITION and problem in wire.problem
    assert streamed(wire, "response_body") == b""


async def test_without_protocol_config_what_is_not_guarded_passes() -> None:
    first = Message(request_headers=head(path="/health", method="GET", ends=True).request_headers)
    wire = await told(first, reply_head(), reply_body(b"ok"))
    assert wire.status is None and wire.parts == [
        *("request_headers", "response_headers", "response_body")
    ]
    assert wire.got[0].mode_override.response_header_mode == pb.HEADER_SEND_MODE_SKIP


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (head(path=""), 400),
        (head(method=""), 400),
        (head(path="", method="CONNECT"), 403),
        (head(path="http://other/v1/models", method="GET"), 403),
        (head(ends=True), 400),
    ],
)
async def test_requests_that_are_none_are_answered(first: Message, status: int) -> None:
    wire = await told(first)
    assert wire.parts == ["immediate_response"]
    assert wire.got[0].immediate_response.status.code == status


@pytest.mark.parametrize(("status", "told_"), [("413", 413), ("200", 502), ("503", 503)])
@every_mode
async def test_reply_to_a_request_that_nobody_got_is_told_without_its_words(
    mode: int, status: str, told_: int
) -> None:
    wire = await told(head(mode), reply_head(status), reply_body(BAD.encode()))
    assert wire.parts[-1] == "immediate_response"
    answer = wire.got[-1].immediate_response
    assert answer.status.code == told_ and BAD.encode() not in answer.body


async def test_reply_to_a_request_that_was_not_seen_goes_out_without_its_words() -> None:
    wire = await told(reply_head("400"), reply_body(BAD.encode()))
    assert wire.parts == ["immediate_response"]
    assert wire.got[0].immediate_response.status.code == 400
    wire = await told(reply_head("200"), reply_body(WHOLE))
    assert wire.status is grpc.StatusCode.FAILED_PRECONDITION and wire.got == []
    shadow = processor(mode="shadow")
    wire = await told(reply_head("400"), reply_body(b"no"), by=shadow)
    assert wire.status is None and wire.parts == ["response_headers", "response_body"]


@every_mode
async def test_stream_that_is_cut_ends_all_that_was_begun(mode: int) -> None:
    guard = FakeGuard()
    serving = processor(guard)
    wire = await told(head(mode), body(ASKED[:20], last=False), by=serving)
    assert wire.status is None and guard.asked == []
    said = [head(mode), body(ASKED), reply_head(kind="text/event-stream")]
    wire = await told(*said, reply_body(b"data: {", last=False), by=processor(guard))
    assert wire.status is None and guard.open_streams == 0


async def test_nothing_is_answered_before_the_verdict() -> None:
    asked = asyncio.Event()
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def gate() -> asyncio.Future[None]:
        asked.set()
        return answer

    wire = Wire([head(), body(ASKED), reply_head(), reply_body(WHOLE)])
    task = asyncio.create_task(processor(FakeGuard(gate=gate)).process(None, wire))  # type: ignore[arg-type]
    await asked.wait()
    assert wire.got == []
    answer.set_result(None)
    async with asyncio.timeout(60):
        await task
    assert streamed(wire, "request_body")


async def test_headers_of_old_versions_are_read() -> None:
    first = head()
    for one in first.request_headers.headers.headers:
        one.value, one.raw_value = one.raw_value.decode(), b""
    wire = await told(first, body(ASKED), reply_head(), reply_body(WHOLE))
    assert streamed(wire, "response_body") == WHOLE


async def test_refusal_may_be_binary() -> None:
    asked = {"messages": [{"role": "user", "content": [{"text": BAD}]}]}
    first = head(path="/model/llama/converse-stream")
    wire = await told(first, body(json.dumps(asked).encode()))
    answer = wire.got[-1].immediate_response
    assert answer.status.code == 200 and b"guardrail_intervened" in answer.body


def test_request_cannot_be_judged_beside_the_backend() -> None:
    with pytest.raises(SettingsError, match="prompt_check"):
        processor(prompt_check="beside")


PARTS = st.one_of(
    st.builds(body, st.sampled_from([ASKED, ASKED[:9], ASKED[9:], b""]), st.booleans()),
    st.builds(reply_head, st.sampled_from(["200", "500"]), ends=st.booleans()),
    st.builds(
        reply_body,
        st.sampled_from([WHOLE, WHOLE[:50], WHOLE[50:], b"data: Hello there.\n\n", b""]),
        st.booleans(),
    ),
    st.just(Message(request_trailers=pb.HttpTrailers(trailers=headers(x_said="Hello there.")))),
    st.just(Message(response_trailers=pb.HttpTrailers(trailers=headers(x_said="Hello there.")))),
    st.just(head()),
    st.just(Message()),
)


@given(
    mode=st.sampled_from(list(MODES.values())),
    messages=st.lists(PARTS, max_size=8),
    orderly=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_comes_nothing_goes_on_that_was_not_allowed(
    mode: int, messages: list[Message], orderly: bool
) -> None:
    """With a guard that allows requests and no reply."""
    guard = FakeGuard(lambda text: Action.BLOCK if "Hello" in text else Action.ALLOW)
    begin = [head(mode), body(ASKED), reply_head()] if orderly else [head(mode)]
    wire = asyncio.run(told(*begin, *messages, by=processor(guard)))
    for answer in wire.got:
        assert b"Hello" not in answer.SerializeToString()
        part = answer.WhichOneof("response")
        if part in ("request_body", "response_body"):  # without one the chunk would go on as it is
            assert getattr(answer, part).response.HasField("body_mutation")
        if part in ("request_trailers", "response_trailers"):
            assert list(getattr(answer, part).header_mutation.remove_headers) == ["x-said"]
