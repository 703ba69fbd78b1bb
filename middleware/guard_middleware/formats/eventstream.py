"""AWS's binary event streams: frames cut from bytes that may be split anywhere, and made.

A frame is its length and that of its headers, a CRC of these, headers, payload, a CRC of all.
A decoder of our own: what a client's decoder will read has to be known to the byte before it is
judged, and botocore, which has one, brings the descriptions of all of AWS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from guard_middleware.formats import fields
from guard_middleware.formats.contract import Unreadable
from guard_middleware.strict_json import Json, dump

MEDIA_TYPE = "application/vnd.amazon.eventstream"
MAX_FRAME_BYTES = 4 * 2**20
MAX_HEADERS_BYTES = 128 * 2**10
PROSE = ":error-message"  # the one header that is no id

_PRELUDE = struct.Struct("!III")
_LENGTHS = struct.Struct("!II")
_CRC = struct.Struct("!I")
_FEWEST_BYTES = _PRELUDE.size + _CRC.size
_STRING = 7
# Types of headers: bytes of the value; those that begin with a length are not here.
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_MEASURED = (6, _STRING)
_KNOWN = frozenset(
    {":message-type", ":event-type", ":exception-type", ":content-type", ":error-code", PROSE}
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. `raw` is what may be sent on for it; `headers` are all that are in there."""

    raw: bytes
    headers: Mapping[str, str]
    payload: bytes


class Framer:
    """Cuts a stream into frames. Raises Unreadable for what does not match its CRCs or lengths.

    Headers that are not known are texts that nobody judges: they are dropped. Known ones other than
    PROSE have to be ids.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._most = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with this data."""
        self._buffer += data
        while len(self._buffer) >= _PRELUDE.size:
            total, headers = self._lengths()
            if len(self._buffer) < total:
                return
            raw = bytes(self._buffer[:total])
            del self._buffer[:total]
            yield _frame(raw, _PRELUDE.size + headers)

    def finish(self) -> None:
        """Raises Unreadable when the stream ended inside a frame."""
        if self._buffer:
            raise Unreadable("ends inside a frame")

    def _lengths(self) -> tuple[int, int]:
        """Checked before a byte is waited for, let alone kept, on their word."""
        total, headers, crc = _PRELUDE.unpack_from(self._buffer)
        if crc32(self._buffer[: _LENGTHS.size]) != crc:
            raise Unreadable("has a frame whose lengths do not match their CRC")
        if total > self._most or headers > MAX_HEADERS_BYTES:
            raise Unreadable(f"has a frame over {self._most} bytes, or too many headers")
        if headers > total - _FEWEST_BYTES:
            raise Unreadable("has a frame that is shorter than its parts")
        return total, headers


def frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """A frame of ours."""
    head = b"".join(_header(name.encode(), value.encode()) for name, value in headers.items())
    lengths = _LENGTHS.pack(_FEWEST_BYTES + len(head) + len(payload), len(head))
    whole = lengths + _CRC.pack(crc32(lengths)) + head + payload
    return whole + _CRC.pack(crc32(whole))


def event(name: str, value: Json) -> bytes:
    """An event of ours."""
    return _message("event", name, value)


def exception(name: str, value: Json) -> bytes:
    """An exception of ours: clients raise it."""
    return _message("exception", name, value)


def _message(kind: str, name: str, value: Json) -> bytes:
    headers = {f":{kind}-type": name, ":content-type": "application/json", ":message-type": kind}
    return frame(headers, dump(value))


def _header(name: bytes, value: bytes) -> bytes:
    return struct.pack("!B", len(name)) + name + struct.pack("!BH", _STRING, len(value)) + value


def _frame(raw: bytes, headers_end: int) -> Frame:
    (crc,) = _CRC.unpack(raw[-_CRC.size :])
    if crc32(raw[: -_CRC.size]) != crc:
        raise Unreadable("has a frame that does not match its CRC")
    payload = raw[headers_end : -_CRC.size]
    try:
        found = dict(_headers(raw[_PRELUDE.size : headers_end]))
    except (IndexError, struct.error, UnicodeDecodeError):
        raise Unreadable("has a frame with malformed headers") from None
    known = {name: value for name, value in found.items() if name in _KNOWN and value is not None}
    for name, value in known.items():
        if name != PROSE and not fields.plain(value):
            raise Unreadable(f"has a frame whose {name} is none")
    return Frame(raw if known == found else frame(known, payload), known, payload)


def _headers(data: bytes) -> Iterator[tuple[str, str | None]]:
    """Names and values; None for a value that is no string. Raises Unreadable, and IndexError,
    struct.error, UnicodeDecodeError for what is cut off or is no text."""
    names: set[str] = set()
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        name, kind, start = data[at + 1 : end].decode(), data[end], end + 1
        if kind in _MEASURED:
            (size,) = struct.unpack_from("!H", data, start)
            start += 2
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise Unreadable("has a frame with a header of no known type")
        at = start + size
        if at > len(data) or name.casefold() in names:
            raise Unreadable("has a frame with malformed headers")
        names.add(name.casefold())
        if name in _KNOWN and kind != _STRING:
            raise Unreadable(f"has a frame whose {name} is none")
        yield name, data[start:at].decode() if kind == _STRING else None
