"""Frames of AWS's event streams, against botocore's decoder and against hostile bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from zlib import crc32

import pytest
from botocore.eventstream import EventStreamBuffer  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.formats.contract import Unreadable
from guard_middleware.formats.eventstream import (
    MAX_FRAME_BYTES,
    MAX_HEADERS_BYTES,
    Framer,
    event,
    exception,
    frame,
)

HEADERS = {":message-type": "event", ":event-type": "contentBlockDelta"}
IDS = st.from_regex(r"[A-Za-z0-9./-]{0,40}", fullmatch=True)
NAMES = st.sampled_from([":message-type", ":event-type", ":exception-type", ":content-type"])
FRAMES = st.tuples(st.dictionaries(NAMES, IDS), st.binary(max_size=200))


def packed(headers: bytes, payload: bytes = b"{}", total: int | None = None) -> bytes:
    """A frame whose CRCs are right, whatever the rest."""
    whole = 16 + len(headers) + len(payload) if total is None else total
    lengths = struct.pack("!II", whole, len(headers))
    start = lengths + struct.pack("!I", crc32(lengths)) + headers + payload
    return start + struct.pack("!I", crc32(start))


def string(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + b"\7" + struct.pack("!H", len(value)) + value


def botocore_reads(data: bytes) -> list[tuple[dict[str, object], bytes]]:
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    return [(message.headers, message.payload) for message in buffer]


@given(st.lists(FRAMES, max_size=4), st.lists(st.integers(0, 2000), max_size=8))
def test_frames_are_those_that_botocore_reads_however_cut(
    frames: list[tuple[dict[str, str], bytes]], cuts: list[int]
) -> None:
    whole = b"".join(frame(headers, payload) for headers, payload in frames)
    places = sorted(min(cut, len(whole)) for cut in cuts)
    framer = Framer()
    got = [
        one
        for a, b in zip([0, *places], [*places, len(whole)], strict=True)
        for one in framer.feed(whole[a:b])
    ]
    framer.finish()
    assert [(one.headers, one.payload) for one in got] == frames == botocore_reads(whole)
    assert b"".join(one.raw for one in got) == whole


@given(st.binary(max_size=120), st.binary(max_size=20))
def test_no_headers_are_read_in_another_way_than_botocore_reads_them(
    headers: bytes, payload: bytes
) -> None:
    _same_as_botocore(packed(headers, payload))


@given(st.lists(st.tuples(st.sampled_from([b":event-type", b"x", b"y"]), st.integers(0, 9))))
def test_headers_of_every_type_are_read_or_refused_as_botocore_does(
    headers: list[tuple[bytes, int]],
) -> None:
    sizes = {2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
    data = b""
    for name, kind in headers:
        value = b"\0\3abc" if kind in (6, 7) else bytes(sizes.get(kind, 0))
        data += bytes([len(name)]) + name + bytes([kind]) + value
    _same_as_botocore(packed(data))


def _same_as_botocore(whole: bytes) -> None:
    try:
        (got,) = Framer().feed(whole)
    except Unreadable:
        return
    ((headers, payload),) = botocore_reads(whole)
    assert payload == got.payload
    assert got.headers.items() <= headers.items()
    assert botocore_reads(got.raw) == [(got.headers, payload)]
    assert got.raw == whole or set(headers) - set(got.headers)


@given(st.data())
def test_one_wrong_bit_makes_a_stream_unreadable(data: st.DataObject) -> None:
    first, second = event("messageStart", {"role": "assistant"}), event("messageStop", {})
    whole = bytearray(first + second)
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    framer, got = Framer(), []
    with pytest.raises(Unreadable):
        for one in framer.feed(bytes(whole)):
            got.append(one.raw)
        framer.finish()
    assert got == ([] if bit < len(first) * 8 else [first])


@pytest.mark.parametrize("total", [0, 11, 12, 15, MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_lengths_that_cannot_be_are_refused_before_more_is_read(total: int) -> None:
    lengths = struct.pack("!II", total, 0)
    with pytest.raises(Unreadable):
        list(Framer().feed(lengths + struct.pack("!I", crc32(lengths))))


@pytest.mark.parametrize("headers", [1, 100, MAX_HEADERS_BYTES + 1, 2**32 - 1])
def test_headers_longer_than_their_frame_are_refused(headers: int) -> None:
    lengths = struct.pack("!II", 16, headers)
    with pytest.raises(Unreadable):
        list(Framer().feed(lengths + struct.pack("!I", crc32(lengths))))


def test_frame_of_the_largest_size_is_read() -> None:
    payload = bytes(MAX_FRAME_BYTES - 16)
    (got,) = Framer().feed(frame({}, payload))
    assert got.payload == payload
    with pytest.raises(Unreadable):
        list(Framer().feed(frame({}, payload + b"x")))


def test_headers_that_nobody_knows_are_dropped() -> None:
    known = string(b":event-type", b"messageStop")
    (got,) = Framer().feed(packed(known + string(b"note", b"some prose") + b"\1n\0"))
    assert got.headers == {":event-type": "messageStop"}
    assert got.raw == frame({":event-type": "messageStop"}, b"{}")


@pytest.mark.parametrize(
    "headers",
    [
        string(b":event-type", b"a word or two"),
        string(b":content-type", b"text/prose; of=some kind"),
        string(b":event-type", b"a") + string(b":event-type", b"b"),
        string(b":event-type", b"a") + string(b":Event-Type", b"b"),
        b"\x0b:event-type\0",  # a truth value
        b"\x0b:event-type\x06\0\1a",  # bytes
        b"\x0b:event-type\x0a",  # a type that is none
        b"\x0b:event-type",
        b"\x0b:event",
        b"\x0b:event-type\7\0",
        b"\x0b:event-type\7\0\5abc",
        string(b"n", b"\xff"),
        string(b"\xff", b"n"),
    ],
)
def test_malformed_headers_make_a_frame_unreadable(headers: bytes) -> None:
    with pytest.raises(Unreadable):
        list(Framer().feed(packed(headers)))


@pytest.mark.parametrize("size", [1, 11, 12, 30])
def test_half_a_frame_at_the_end_is_unreadable(size: int) -> None:
    framer = Framer()
    assert list(framer.feed(event("messageStop", {})[:size])) == []
    with pytest.raises(Unreadable):
        framer.finish()


def test_error_messages_may_be_prose() -> None:
    headers: Mapping[str, str] = {":message-type": "error", ":error-message": "It is all over."}
    (got,) = Framer().feed(frame(headers, b""))
    assert got.headers == headers


def test_exceptions_are_what_botocore_takes_for_exceptions() -> None:
    ((headers, payload),) = botocore_reads(exception("throttlingException", {"message": "No."}))
    assert (headers[":message-type"], headers[":exception-type"]) == (
        "exception",
        "throttlingException",
    )
    assert payload == b'{"message":"No."}'
