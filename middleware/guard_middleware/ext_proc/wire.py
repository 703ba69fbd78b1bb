"""Between Envoy's messages and ASGI's: headers, answers, what an exchange begins with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import unquote

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.bodies import header
from guard_middleware.messages import Header, Scope
from guard_middleware.strict_json import dump

# Between two neighbours on the wire, and Envoy's own: a change to these is none of ours.
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection"})
_OVERWRITE = pb.HeaderValueOption.HEADER_APPEND_ACTION_OVERWRITE_IF_EXISTS_OR_ADD
_APPEND = pb.HeaderValueOption.HEADER_APPEND_ACTION_APPEND_IF_EXISTS_OR_ADD


class Misled(ValueError):
    """Envoy is set, or behaves, in a way in which nothing can be promised. The text says how, and
    what to do; nothing of the exchange is in it."""


def headers_of(given: pb.HeaderMap) -> list[Header]:
    """The headers as ASGI has them, Envoy's pseudo-headers among them."""
    return [(one.key.encode(), one.raw_value or one.value.encode()) for one in given.headers]


def scope_of(given: pb.HttpHeaders) -> Scope:
    """What a server would call an application with. Raises ValueError for what is no request."""
    everything = headers_of(given.headers)
    pseudo = {key: value for key, value in everything if key.startswith(b":")}
    headers = [(key, value) for key, value in everything if not key.startswith(b":")]
    method = pseudo.get(b":method", b"").decode("latin-1")
    raw, _, query = pseudo.get(b":path", b"").partition(b"?")
    if not method or not raw and method != "CONNECT":
        raise ValueError("the request has no :method or no :path")
    if authority := pseudo.get(b":authority"):
        headers.insert(0, (b"host", authority))
    upgrades = b"websocket" in header(headers, b"upgrade").lower().encode("latin-1")
    return {
        "type": "websocket" if method == "CONNECT" or upgrades else "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": method,
        "scheme": pseudo.get(b":scheme", b"http").decode("latin-1"),
        "path": unquote((raw or b"/").decode("latin-1")),
        "raw_path": raw or b"/",
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "extensions": {},
    }


def mutation(
    old: Iterable[Header], new: Iterable[Header], length: bool = False
) -> pb.HeaderMutation:
    """What makes the new headers of the old ones. With `length` the new content-length is told,
    which Envoy holds against the body where that is whole."""
    ignored = _FRAMING - {b"content-length"} if length else _FRAMING
    before, after = _by_name(old, ignored), _by_name(new, ignored)
    changed = pb.HeaderMutation(remove_headers=sorted(n.decode() for n in before.keys() - after))
    for name, values in after.items():
        if before.get(name) != values:
            changed.set_headers.extend(_set(name, values))
    return changed


def _by_name(headers: Iterable[Header], without: frozenset[bytes]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for key, value in headers:
        if key not in without and key != b"host":
            found.setdefault(key, []).append(value)
    return found


def _set(name: bytes, values: Sequence[bytes]) -> Iterable[pb.HeaderValueOption]:
    for at, value in enumerate(values):
        one = pb.HeaderValue(key=name.decode(), raw_value=value)
        yield pb.HeaderValueOption(header=one, append_action=_APPEND if at else _OVERWRITE)


def without_all(trailers: pb.HttpTrailers) -> pb.HeaderMutation:
    """Nothing of the trailers goes on: no guard has read them."""
    names = {one.key for one in trailers.trailers.headers if not one.key.startswith(":")}
    return pb.HeaderMutation(remove_headers=sorted(names))


def immediate(status: int, headers: Iterable[Header], body: bytes) -> pb.ProcessingResponse:
    """A whole reply of ours; Envoy tells its length."""
    told = _by_name(headers, _FRAMING)
    options = [one for name, values in told.items() for one in _set(name, values)]
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=status),
            headers=pb.HeaderMutation(set_headers=options),
            body=body,
            details="guard",
        )
    )


def status_of(headers: Iterable[Header]) -> int:
    """A reply's status; 0 when it tells none."""
    told = next((value for key, value in headers if key == b":status"), b"")
    return int(told) if told.isdigit() else 0


def wordless(status: int) -> pb.ProcessingResponse:
    """In place of a reply to a request that the backend has not got: Envoy's own (a body over its
    limit, a path that it refuses, a timeout), or of a backend that does not wait."""
    body = dump({"error": {"message": "The request was not completed.", "type": "gateway"}})
    kind = (b"content-type", b"application/json")
    return immediate(status if status >= 400 else 502, [kind], body)


class Words:
    """Answers to the messages of one direction: "request" or "response"."""

    def __init__(self, direction: str) -> None:
        self._direction = direction

    def headers(self, changed: pb.HeaderMutation | None = None) -> pb.ProcessingResponse:
        """The headers go on, changed."""
        common = pb.CommonResponse(header_mutation=changed)
        return self._answer("headers", pb.HeadersResponse(response=common))

    def unchanged(self) -> pb.ProcessingResponse:
        """A body, or a chunk of one, goes on as it came."""
        return self._answer("body", pb.BodyResponse())

    def body(self, data: bytes, changed: pb.HeaderMutation | None = None) -> pb.ProcessingResponse:
        """These bytes go on in place of what came."""
        instead = pb.BodyMutation(body=data) if data else pb.BodyMutation(clear_body=True)
        common = pb.CommonResponse(header_mutation=changed, body_mutation=instead)
        return self._answer("body", pb.BodyResponse(response=common))

    def chunk(self, data: bytes, end: bool) -> pb.ProcessingResponse:
        """These bytes go on, whatever came."""
        streamed = pb.StreamedBodyResponse(body=data, end_of_stream=end)
        common = pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=streamed))
        return self._answer("body", pb.BodyResponse(response=common))

    def trailers(self, changed: pb.HeaderMutation | None = None) -> pb.ProcessingResponse:
        """The trailers go on, changed."""
        return self._answer("trailers", pb.TrailersResponse(header_mutation=changed))

    def _answer(self, part: str, message: object) -> pb.ProcessingResponse:
        return pb.ProcessingResponse(**{f"{self._direction}_{part}": message})  # type: ignore[arg-type]
