"""The marker in everything that a caller can send: over HTTP and over gRPC."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from guard_api.v1 import guard_pb2
from guard_middleware.conformance.cases import Case, attempts, basics
from guard_middleware.conformance.requests import PROTOCOLS, Place, post
from guard_middleware.conformance.run import Deployment
from tests.marker.upstream import HOW, MARKER, REPLIES

UNSAFE = f"fake-bomb {MARKER}"
TOKEN = f"Bearer {MARKER}"
GOOD, OLD = f"Bearer known-{MARKER * 3}", f"old-{MARKER * 3}"  # to the guard that knows callers
_M = MARKER.encode()
_SERVICE = "/guard_api.v1.GuardService/"
_SECRETS = (
    f"Authorization: {TOKEN}",
    f"Cookie: s={MARKER}",
    f"X-{MARKER}: {MARKER}",
    f"Baggage: {MARKER}={MARKER}",
)


def picture(colour: tuple[int, int, int]) -> bytes:
    """A file whose metadata hold the marker, and whose pixels spell it."""
    image = Image.new("RGB", (32, 32), colour)
    image.frombytes((_M * 400)[: 32 * 32 * 3])
    told = PngInfo()
    told.add_text(MARKER, MARKER)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=told, exif=b"Exif\x00\x00" + _M)
    return file.getvalue()


def over_http(place: Place) -> Iterator[Case]:
    """All cases of the conformance set, and what it lacks: replies of every kind, images, tools,
    addresses, what is broken and what is too large."""
    for protocol in PROTOCOLS:
        yield from basics(place, protocol, UNSAFE)
    yield from attempts(place, UNSAFE)
    for how in REPLIES:
        for stream in (False, True):
            body = json.dumps({**chat(f"Hello {MARKER}"), "stream": stream}).encode()
            yield _case(how, post(_with(place, how), _path(), body))
    for name, value in bodies().items():
        yield _case(name, post(place, _path(), value))
    for target in (f"/{MARKER}", f"/v1/{MARKER}?{MARKER}={MARKER}#{MARKER}", f"http://{MARKER}/v1"):
        yield _case(target, _to(place, target))
    yield _case("no HTTP", _M * 3 + b"\r\n\r\n")
    yield _case("wrong method", post(place, _path(), b"{}", method=MARKER))
    yield _case("wrong header", b"POST / HTTP/1.1\r\n" + _M + b" \x00: " + _M + b"\r\n\r\n")
    yield _case("long header", b"GET / HTTP/1.1\r\nx: " + _M * 8000 + b"\r\n\r\n")


def _to(place: Place, target: str) -> bytes:
    return post(place, _path(), b"{}", target=lambda _: target)


def _case(name: str, request: bytes) -> Case:
    return Case(name, "openai-chat", True, request)


def _path() -> str:
    return f"/v1/chat/completions?key={MARKER}"


def _with(place: Place, how: str) -> Place:
    return Place(place.host, place.prefix, (*place.headers, f"{HOW}: {how}"), place.model)


def chat(content: Any, **more: Any) -> dict[str, Any]:
    """One turn of the user."""
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


def bodies() -> dict[str, bytes]:
    """Bodies of chats by what is in them."""
    call = {"id": MARKER, "type": "function", "function": {"name": MARKER, "arguments": UNSAFE}}
    tools = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": MARKER, "name": MARKER, "content": MARKER},
        {"role": "user", "content": "and?"},
    ]
    values: dict[str, Any] = {
        "tool turns": {"model": "m", "messages": tools},
        "wrong role": {"model": "m", "messages": [{"role": MARKER, "content": MARKER}]},
        "wrong content": chat({MARKER: MARKER}),
        "unknown keys": chat("x", **{MARKER: MARKER}),
        "unknown part": chat([{"type": MARKER, MARKER: MARKER}]),
        "audio": chat([{"type": "input_audio", "input_audio": {"data": MARKER}}]),
        "model": {**chat(UNSAFE), "model": MARKER},
        "lone surrogate": chat(f"{MARKER} \ud800"),
        "address of an image": chat(_image(f"https://{MARKER}.example/{MARKER}")),
        "data that is none": chat(_image(f"data:image/png;base64,{MARKER}")),
        "image that is none": chat(_image(_data(_M * 40))),
        "image": chat(_image(_data(picture((0, 0, 255))))),
        "cut image": chat(_image(_data(picture((0, 0, 255))[:120]))),
    }
    return {
        **{name: json.dumps(value).encode() for name, value in values.items()},
        "broken JSON": b'{"messages": [{"content": "%s' % _M,
        "key twice": b'{"%s": 1, "%s": 2}' % (_M, _M),
        "not UTF-8": b'{"messages": "%s\xff"}' % _M,
        "deep JSON": b'{"%s":' % _M * 3000,
        "too large": b'{"%s": "%s"}' % (_M, _M * 3_000_000),
    }


def _image(url: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": MARKER}, {"type": "image_url", "image_url": {"url": url}}]


def _data(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def answered(where: Deployment) -> list[tuple[Case, bytes]]:
    """Every case and what was answered, on a connection for each."""
    place = Place(where.place.host, "", _SECRETS, "m")
    cases = list(over_http(place))
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda case: where.answer(case)[0], cases)
    return list(zip(cases, answers, strict=True))


async def over_grpc(target: str) -> list[str]:
    """Every call that goes wrong, or whose turn is refused: all that its error says."""
    errors = []
    metadata = (
        ("authorization", TOKEN),
        ("x-api-key", MARKER),
        ("x-bin-bin", _M),
        ("baggage", f"{MARKER}={MARKER}"),
    )
    async with grpc.aio.insecure_channel(
        target, options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        for rpc, messages in _calls():
            make = channel.stream_stream if rpc == "ClassifyStream" else channel.unary_unary
            call: Any = make(_SERVICE + rpc, bytes, bytes)
            try:
                if rpc == "ClassifyStream":
                    async for _ in call(iter(messages), metadata=metadata, timeout=60):
                        pass
                else:
                    errors.append(
                        _items(rpc, await call(messages[0], metadata=metadata, timeout=60))
                    )
            except grpc.aio.AioRpcError as error:
                told = [error.details(), error.debug_error_string(), error.trailing_metadata()]
                errors.append(str(told))
            await asyncio.sleep(0)
    return errors


async def as_strangers(target: str) -> list[str]:
    """Calls with credentials that are wrong, too old, or nobody's, and one with a good one: what
    is said to each."""
    said = []
    request = guard_pb2.ClassifyRequest(conversation=_turn(UNSAFE)).SerializeToString()
    jwt = ".".join(
        base64.urlsafe_b64encode(json.dumps(one).encode()).decode().rstrip("=")
        for one in ({"alg": MARKER, "kid": MARKER}, {"iss": MARKER, "sub": MARKER}, MARKER)
    )
    async with grpc.aio.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(f"{_SERVICE}Classify", bytes, bytes)
        for token in (TOKEN, f"Basic {MARKER}", f"Bearer {jwt}", MARKER, f"Bearer {OLD}", GOOD):
            try:
                await call(request, metadata=(("authorization", token),), timeout=60)
                said.append("OK")
            except grpc.aio.AioRpcError as error:
                said.append(str([error.details(), error.trailing_metadata()]))
    return said


def _turn(text: str) -> guard_pb2.Conversation:
    message = guard_pb2.Message(role=guard_pb2.ROLE_USER, parts=[guard_pb2.Part(text=text)])
    return guard_pb2.Conversation(messages=[message])


def _items(rpc: str, reply: bytes) -> str:
    """The errors of a batch's items, in one text; a verdict has none."""
    if rpc != "ClassifyBatch":
        return repr(reply)
    return str(guard_pb2.ClassifyBatchResponse.FromString(reply))


def _calls() -> Iterator[tuple[str, list[bytes]]]:
    part, role = guard_pb2.Part, guard_pb2.ROLE_USER
    call = guard_pb2.ToolCall(id=MARKER, name=MARKER, arguments=UNSAFE)
    image, wrong = guard_pb2.Image, guard_pb2.Image(data=_M * 40, mime_type=MARKER)
    conversations = {
        "text": [(role, part(text=MARKER))],
        "unsafe": [(role, part(text=UNSAFE))],
        "long": [(role, part(text=f"{MARKER} " * 45_000))],
        "too large": [(role, part(text=MARKER * 500_000))],
        "image": [(role, part(image=image(data=picture((0, 0, 255)))))],
        "red image": [(role, part(image=image(data=picture((255, 0, 0)))))],
        "cut image": [(role, part(image=image(data=picture((0, 0, 255))[:120])))],
        "image that is none": [(role, part(image=wrong))],
        "address": [(role, part(image=image(uri=f"https://{MARKER}.example/{MARKER}")))],
        "address that is none": [(role, part(image=image(uri=f"{MARKER}:{MARKER}")))],
        "tool call": [(guard_pb2.ROLE_ASSISTANT, part(tool_call=call))],
        "tool call of a user": [(role, part(tool_call=call))],
        "tool result": [(guard_pb2.ROLE_TOOL, part(tool_result=guard_pb2.ToolResult(text=UNSAFE)))],
        "no role": [(guard_pb2.ROLE_UNSPECIFIED, part(text=MARKER))],
        "no part": [(role, part())],
    }
    requests = [
        guard_pb2.ClassifyRequest(
            conversation=guard_pb2.Conversation(
                messages=[guard_pb2.Message(role=who, parts=[one]) for who, one in said]
            )
        )
        for said in conversations.values()
    ]
    plain = requests[0].conversation
    requests += [
        guard_pb2.ClassifyRequest(conversation=plain, policy=MARKER),
        guard_pb2.ClassifyRequest(conversation=plain, language=MARKER),
        guard_pb2.ClassifyRequest(conversation=plain, policy="strict", return_images=True),
    ]
    small = [one for one in requests if one.ByteSize() < 2**20]
    for request in requests:
        yield "Classify", [request.SerializeToString()]
        start = guard_pb2.StreamStart(conversation=request.conversation, policy=request.policy)
        yield "ClassifyStream", _steps(start, MARKER, UNSAFE)
    yield "ClassifyBatch", [guard_pb2.ClassifyBatchRequest(requests=small).SerializeToString()]
    for rpc in ("Classify", "ClassifyBatch", "ClassifyStream", "GetInfo", MARKER):
        yield rpc, [_M + b"\xff"]
    piece = guard_pb2.ClassifyStreamRequest(piece=guard_pb2.StreamPiece(text=MARKER))
    yield "ClassifyStream", [piece.SerializeToString()]


def _steps(start: guard_pb2.StreamStart, *pieces: str) -> list[bytes]:
    steps = [guard_pb2.ClassifyStreamRequest(start=start)]
    steps += [
        guard_pb2.ClassifyStreamRequest(piece=guard_pb2.StreamPiece(text=text, check=True))
        for text in pieces
    ]
    steps.append(guard_pb2.ClassifyStreamRequest(piece=guard_pb2.StreamPiece(end=True)))
    return [step.SerializeToString() for step in steps]
