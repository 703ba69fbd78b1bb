"""Attempts to spell a harmful body so that a guard and a backend read it differently."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping

from guard_middleware.conformance.requests import BENIGN, turn


def _doubled(body: bytes, harmless_first: bool) -> bytes:
    harmless = json.dumps({"messages": turn(BENIGN)}).encode()
    first, second = (harmless, body) if harmless_first else (body, harmless)
    return first[:-1] + b"," + second[1:]


def _escaped(harm: str) -> str:
    return "".join(f"\\u{ord(one):04x}" for one in harm)


# Of (body, harm): the same body, as parsers may read it differently.
SPELLED: Mapping[str, Callable[[bytes, str], bytes]] = {
    "key twice, the harmful one last": lambda body, harm: _doubled(body, True),
    "key twice, the harmful one first": lambda body, harm: _doubled(body, False),
    "key twice, once with escapes": lambda body, harm: (
        b'{"mess\\u0061ges":' + json.dumps(turn(BENIGN)).encode() + b"," + body[1:]
    ),
    "key twice, in another case": lambda body, harm: (
        b'{"Messages":' + json.dumps(turn(harm)).encode() + b"," + _benign(body, harm)[1:]
    ),
    "content twice within a turn": lambda body, harm: body.replace(
        b'"content":', b'"content": "' + BENIGN.encode() + b'", "content":'
    ),
    "text in Unicode escapes": lambda body, harm: body.replace(
        json.dumps(harm)[1:-1].encode(), _escaped(harm).encode()
    ),
    "keys in Unicode escapes": lambda body, harm: body.replace(b'"content"', b'"c\\u006fntent"'),
    "lone surrogate": lambda body, harm: body.replace(b'"content": "', b'"content": "\\ud800'),
    "byte order mark": lambda body, harm: b"\xef\xbb\xbf" + body,
    "UTF-16 with a mark": lambda body, harm: body.decode().encode("utf-16"),
    "UTF-16, big endian": lambda body, harm: body.decode().encode("utf-16-be"),
    "UTF-32": lambda body, harm: body.decode().encode("utf-32"),
    "UTF-7": lambda body, harm: body.replace(b"{", b"+AHs-").replace(b"}", b"+AH0-"),
    "overlong UTF-8": lambda body, harm: body.replace(b"a", b"\xc1\xa1", 1),
    "comments in JSON": lambda body, harm: b"/* */" + body,
    "trailing comma": lambda body, harm: body[:-1] + b",}",
    "single quotes": lambda body, harm: body.replace(b'"', b"'"),
    "NaN among the values": lambda body, harm: body[:-1] + b',"temperature":NaN}',
    "two documents": lambda body, harm: _benign(body, harm) + b"\n" + body,
    "document in a list": lambda body, harm: b"[" + body + b"]",
    "document in a text": lambda body, harm: json.dumps(body.decode()).encode(),
    "null byte in front": lambda body, harm: b"\x00" + body,
    "nested beyond measure": lambda body, harm: (
        body[:-1] + b',"a":' + b"[" * 5000 + b"]" * 5000 + b"}"
    ),
    "spaces before and behind": lambda body, harm: b" \r\n\t" + body + b"\n" * 100,
    "oversized body": lambda body, harm: body[:-1] + b',"a":"' + b"x" * 34_000_000 + b'"}',
}


def _benign(body: bytes, harm: str) -> bytes:
    return body.replace(json.dumps(harm)[1:-1].encode(), BENIGN.encode())


_BOUNDARY = "conformance-boundary"
_JSON_TYPE = "Content-Type: application/json"


def _form(body: bytes) -> bytes:
    return b"messages=" + body


def _multipart(body: bytes) -> bytes:
    head = b'--%s\r\nContent-Disposition: form-data; name="messages"\r\n\r\n' % _BOUNDARY.encode()
    return head + body + b"\r\n--%s--\r\n" % _BOUNDARY.encode()


def _raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def _bomb(body: bytes) -> bytes:
    return gzip.compress(body[:-1] + b',"a":"' + bytes(40_000_000) + b'"}', 1)


# Frames that hold the body as it is: what a decoder makes of them does not depend on a packer.
def _zstd(body: bytes) -> bytes:
    head = b"\x28\xb5\x2f\xfd\xa0" + len(body).to_bytes(4, "little")
    return head + (len(body) << 3 | 1).to_bytes(3, "little") + body


def _brotli(body: bytes) -> bytes:
    # RFC 7932, 9.2: a window of 16 bits, one uncompressed meta-block, an empty last one.
    size = (len(body) - 1) << 4 | 1 << 20  # ISLAST 0, MNIBBLES 4, MLEN - 1, ISUNCOMPRESSED
    return (size).to_bytes(3, "little") + body + b"\x03"


# Headers, and what becomes of the body.
PACKED: Mapping[str, tuple[tuple[str, ...], Callable[[bytes], bytes]]] = {
    "coding: gzip": ((_JSON_TYPE, "Content-Encoding: gzip"), gzip.compress),
    "coding: gzip in capitals": ((_JSON_TYPE, "Content-Encoding: GZIP"), gzip.compress),
    "coding: deflate": ((_JSON_TYPE, "Content-Encoding: deflate"), zlib.compress),
    "coding: deflate without a header": ((_JSON_TYPE, "Content-Encoding: deflate"), _raw_deflate),
    "coding: br": ((_JSON_TYPE, "Content-Encoding: br"), _brotli),
    "coding: zstd": ((_JSON_TYPE, "Content-Encoding: zstd"), _zstd),
    "coding: gzip twice": (
        (_JSON_TYPE, "Content-Encoding: gzip, gzip"),
        lambda body: gzip.compress(gzip.compress(body)),
    ),
    "coding: gzip within deflate": (
        (_JSON_TYPE, "Content-Encoding: gzip", "Content-Encoding: deflate"),
        lambda body: zlib.compress(gzip.compress(body)),
    ),
    "coding: two gzip members": (
        (_JSON_TYPE, "Content-Encoding: gzip"),
        lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:]),
    ),
    "coding: gzip that is cut": (
        (_JSON_TYPE, "Content-Encoding: gzip"),
        lambda body: gzip.compress(body)[:-6],
    ),
    "coding: gzip that is not told": ((_JSON_TYPE,), gzip.compress),
    "coding: told and not done": ((_JSON_TYPE, "Content-Encoding: gzip"), lambda body: body),
    "coding: identity and gzip": (
        (_JSON_TYPE, "Content-Encoding: identity, gzip"),
        gzip.compress,
    ),
    "coding: dropped by Connection": (
        (_JSON_TYPE, "Content-Encoding: gzip", "Connection: content-encoding"),
        gzip.compress,
    ),
    "coding: a bomb": ((_JSON_TYPE, "Content-Encoding: gzip"), _bomb),
    "charset: UTF-16 by its header": (
        ("Content-Type: application/json; charset=utf-16le",),
        lambda body: body.decode().encode("utf-16-le"),
    ),
    "charset: EBCDIC by its header": (
        ("Content-Type: application/json; charset=cp037",),
        lambda body: body.decode().encode("cp037"),
    ),
    "charset: UTF-7 by its header": (
        ("Content-Type: application/json; charset=utf-7",),
        lambda body: body.replace(b"{", b"+AHs-").replace(b"}", b"+AH0-"),
    ),
    "media type: a form": (("Content-Type: application/x-www-form-urlencoded",), _form),
    "media type: multipart": (
        (f"Content-Type: multipart/form-data; boundary={_BOUNDARY}",),
        _multipart,
    ),
    "media type: plain text": (("Content-Type: text/plain",), lambda body: body),
    "media type: none": ((), lambda body: body),
    "media type: two": ((_JSON_TYPE, "Content-Type: text/plain"), lambda body: body),
}
