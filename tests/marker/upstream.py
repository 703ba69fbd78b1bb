"""A backend that says the marker in every way that a reply can be right or wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping

from tests.middleware.formats.openai_replies import chunk, reply

HOW = "x-how"  # the header that asks for one of REPLIES
ADDRESS = "MARKER_UPSTREAM"  # of the backend, for an application
MARKER = "qMARKERq7x9w"
_JSON, _EVENTS = b"application/json", b"text/event-stream"


def _sized(body: bytes, kind: bytes = _JSON, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\nconnection: close\r\n%scontent-length: %d\r\n\r\n"
    return head % (status, kind, more, len(body)) + body


def _chunked(raw: bytes, kind: bytes = _EVENTS) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\nconnection: close\r\n" % kind
    return head + b"transfer-encoding: chunked\r\n\r\n" + raw


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _sse(*values: object) -> bytes:
    return b"".join(b"data: %s\n\n" % _json(value) for value in values)


_CALL = {"id": MARKER, "type": "function", "function": {"name": MARKER, "arguments": MARKER}}
_LAST = b"0\r\n\r\n"
_WRONG = {"choices": [{"index": MARKER, "message": {"content": [MARKER]}}]}
_SAID = chunk({"content": f"{MARKER} "})
_M = MARKER.encode()
REPLIES: Mapping[str, bytes] = {
    "text": _sized(_json(reply(f"It is {MARKER}."))),
    "unsafe": _sized(_json(reply(f"It is {MARKER} fake-bomb."))),
    "tool calls": _sized(_json(reply("", tool_calls=[_CALL]))),
    "unknown keys": _sized(_json({**reply("x", **{MARKER: {MARKER: [MARKER]}}), MARKER: MARKER})),
    "broken JSON": _sized(b'{"choices": [{"message": {"content": "%s' % _M),
    "key twice": _sized(b'{"%s": 1, "%s": 2}' % (_M, _M)),
    "not UTF-8": _sized(b'{"x": "%s\xff"}' % _M),
    "no reply at all": _sized(_json([MARKER, {MARKER: MARKER}])),
    "wrong types": _sized(_json(_WRONG)),
    "image": _sized(_json(reply("", image={"url": f"data:image/png;base64,{MARKER}"}))),
    "error": _sized(_json({"error": {"message": MARKER, "code": MARKER}}), status=b"500 " + _M),
    "error in text": _sized(_M, b"text/plain", b"429 Too " + _M),
    "another kind": _sized(_M, b"application/x-" + _M),
    "headers": _sized(_json(reply("x")), more=b"x-%s: %s\r\nset-cookie: a=%s\r\n" % (_M, _M, _M)),
    "wrong packing": _sized(_M, more=b"content-encoding: gzip\r\n"),
    "packed": _sized(gzip.compress(_json(reply(MARKER))), more=b"content-encoding: gzip\r\n"),
    "unknown packing": _sized(_M, more=b"content-encoding: %s\r\n" % _M),
    "stream": _chunked(_chunk(_sse(_SAID, chunk({}, finish="stop")) + b"data: [DONE]\n\n") + _LAST),
    "unsafe stream": _chunked(_chunk(_sse(_SAID, chunk({"content": "fake-bomb"}))) + _LAST),
    "broken event": _chunked(_chunk(_sse(_SAID) + b'data: {"%s": \n\n' % _M) + _LAST),
    "event that is none": _chunked(_chunk(_sse(_SAID, [MARKER], MARKER)) + _LAST),
    "field that is none": _chunked(_chunk(_sse(_SAID) + b"%s: %s\n\n" % (_M, _M)) + _LAST),
    "error in a stream": _chunked(_chunk(_sse(_SAID, {"error": {"message": MARKER}})) + _LAST),
    "stream that breaks off": _chunked(_chunk(_sse(_SAID))),
    "wrong chunk": _chunked(_chunk(_sse(_SAID)) + b"%s\r\n%s" % (_M, _M)),
    "wrong chunk at once": _chunked(b"%s\r\n%s" % (_M, _M), _JSON),
    "wrong status line": b"HTTP/1.1 %s\r\n\r\n" % _M,
    "no HTTP": _M * 3 + b"\r\n\r\n",
    "wrong header": b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % _M,
    "wrong length": b"HTTP/1.1 200 OK\r\ncontent-length: %s\r\n\r\n%s" % (_M, _M),
    "nothing": b"",
}


class Upstream:
    """Counts requests that had the marker in them: so it did get here."""

    def __init__(self) -> None:
        self.marked = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one reply, the end."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = (line.partition(b": ") for line in head.split(b"\r\n"))
            named = {key.lower(): value for key, _, value in lines}
            body = await reader.readexactly(int(named.get(b"content-length", b"0")))
            self.marked += _M.lower() in (head + body).lower()
            writer.write(REPLIES[named.get(HOW.encode(), b"text").decode()])
            await writer.drain()
        except (OSError, EOFError, ValueError):
            pass
        finally:
            writer.close()
