"""Bodies of requests and replies: whole, unpacked, and never larger than they may be."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from guard_middleware.messages import Header, Message, Receive

Headers = Iterable[Header]


class TooLarge(ValueError):
    """There are more bytes than may be."""


class Encoded(ValueError):
    """The content is packed in a way that is not read here, or is not what its header says."""


class Gone(Exception):
    """The client has left before its request was complete."""


class Unpacker:
    """Unpacks a body piece by piece. Raises Encoded, and TooLarge past `most` unpacked bytes: of
    the whole body, or, for streams, of `each` piece."""

    def __init__(self, coding: str, most: int, *, each: bool = False) -> None:
        self._most = most
        self._each = each
        self._size = 0
        self._packed = False
        if coding in ("", "identity"):
            self._inflate = None
        elif coding in ("gzip", "x-gzip"):
            self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        elif coding == "deflate":
            self._inflate = zlib.decompressobj()
        else:
            raise Encoded("the content's coding is not supported; send gzip, deflate or none")

    def feed(self, data: bytes) -> bytes:
        """What these bytes unpack to."""
        if self._each:
            self._size = 0
        if self._inflate is not None and data:
            self._packed = True
            try:
                data = self._inflate.decompress(data, self._most - self._size + 1)
            except zlib.error:
                raise Encoded("the content is not what its content-encoding says") from None
            if self._inflate.unused_data:
                raise Encoded("there is more than one packed content")
        self._size += len(data)
        if self._size > self._most:
            raise TooLarge(f"the body is over {self._most} bytes")
        return data

    def finish(self) -> None:
        """Raises Encoded when the packed content is not complete."""
        if self._packed and self._inflate is not None and not self._inflate.eof:
            raise Encoded("the packed content is not complete")


async def read_body(receive: Receive, headers: Headers, most: int) -> bytes:
    """The request's whole body, unpacked. Raises TooLarge, Encoded, Gone."""
    unpacker = Unpacker(coding_of(headers), most)
    length = header(headers, b"content-length")
    if length.isdigit() and int(length) > most:
        raise TooLarge(f"the body is over {most} bytes")
    chunks: list[bytes] = []
    received = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        data = message.get("body", b"")
        received += len(data)
        if received > most:
            raise TooLarge(f"the body is over {most} bytes")
        chunks.append(unpacker.feed(data))
        if not message.get("more_body", False):
            unpacker.finish()
            return b"".join(chunks)


def has_body(headers: Headers) -> bool:
    """Whether the request says that it has one."""
    headers = list(headers)
    return header(headers, b"content-length") not in ("", "0") or bool(
        header(headers, b"transfer-encoding")
    )


def without_body(receive: Receive) -> Receive:
    """`receive` of a request that has none, whatever the client sends: HTTP/2 need not say so."""
    messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def bare() -> Message:
        if messages:
            return messages.pop()
        while (message := await receive())["type"] != "http.disconnect":
            pass
        return message

    return bare


def header(headers: Headers, name: bytes) -> str:
    """A header's value, several joined as HTTP wants it; empty without one."""
    values = [value for key, value in headers if key.lower() == name]
    return b", ".join(values).decode("latin-1").strip()


def coding_of(headers: Headers) -> str:
    """The content coding, in lower case."""
    return header(headers, b"content-encoding").lower()


def media_type(headers: Headers) -> str:
    """The content type without parameters, in lower case."""
    return header(headers, b"content-type").partition(";")[0].strip().lower()


def replaced(headers: Headers, without: Iterable[bytes], *more: Header) -> list[Header]:
    """The headers without some, and with others."""
    gone = frozenset(without)
    return [(key, value) for key, value in headers if key.lower() not in gone] + list(more)
