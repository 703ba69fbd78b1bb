"""Attempts to bring a harmful request past a proxy by its target, its method, its framing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from guard_middleware.conformance.requests import Place, head

# Another spelling of the path.
TARGETS: Mapping[str, Callable[[str], str]] = {
    "path: doubled slash": lambda path: f"/{path}",
    "path: doubled slashes within": lambda path: path.replace("/", "//"),
    "path: trailing slash": lambda path: f"{path}/",
    "path: trailing dot": lambda path: f"{path}.",
    "path: trailing space": lambda path: f"{path}%20",
    "path: in capitals": lambda path: path.upper(),
    "path: a dot": lambda path: path.replace("/chat", "/./chat"),
    "path: two dots": lambda path: f"/x/..{path}",
    "path: two dots from health": lambda path: f"/health/..{path}",
    "path: two dots from models": lambda path: path.replace("/chat", "/models/../chat"),
    "path: two dots in escapes": lambda path: path.replace("/chat", "/models/%2e%2e/chat"),
    "path: two dots behind an escaped slash": lambda path: path.replace(
        "/chat", "/models/..%2fchat"
    ),
    "path: escaped slashes": lambda path: "/" + path[1:].replace("/", "%2f"),
    "path: slashes escaped twice": lambda path: "/" + path[1:].replace("/", "%252f"),
    "path: escaped letters": lambda path: path.replace("chat", "%63%68at"),
    "path: parameters": lambda path: f"{path};a=b",
    "path: parameters within": lambda path: path.replace("/chat", ";a=b/chat"),
    "path: parameters that are dots": lambda path: path.replace("/chat", "/models/..;/chat"),
    "path: backslashes": lambda path: "/" + path[1:].replace("/", "\\"),
    "path: null byte": lambda path: f"{path}%00",
    "path: null byte and a harmless end": lambda path: f"{path}%00/health",
    "path: newline": lambda path: f"{path}%0a",
    "path: letters that fold to others": lambda path: path[:-1] + "%c5%bf",
    "path: fragment": lambda path: f"{path}#/health",
    "path: a prefix in front": lambda path: f"/any/prefix{path}",
    "query: a harmless path": lambda path: f"{path}?/../../health",
    "query: an override": lambda path: f"{path}?path=/health&_method=GET",
    "query: an escaped question mark": lambda path: f"{path}%3fx",
    "target: absolute": lambda path: f"http://localhost{path}",
    "target: absolute, of another host": lambda path: f"http://other.example{path}",
    "target: an authority in front": lambda path: f"@other.example{path}",
    "target: no slash in front": lambda path: path[1:],
}

# The method, and more headers.
METHODS: Mapping[str, tuple[str, ...]] = {
    "method: PUT": ("PUT",),
    "method: PATCH": ("PATCH",),
    "method: DELETE": ("DELETE",),
    "method: GET with a body": ("GET",),
    "method: HEAD with a body": ("HEAD",),
    "method: OPTIONS with a body": ("OPTIONS",),
    "method: OPTIONS, overridden": ("OPTIONS", "X-HTTP-Method-Override: POST"),
    "method: GET, overridden": ("GET", "X-HTTP-Method-Override: POST"),
    "method: TRACE": ("TRACE",),
    "method: CONNECT": ("CONNECT",),
    "method: QUERY": ("QUERY",),
    "method: small letters": ("post",),
    "header: the path in another": ("GET", "X-Original-URL: /v1/chat/completions"),
    "header: a verdict's id of their own": ("POST", "X-Guard-Verdict-Id: 1"),
}


@dataclass(frozen=True, slots=True)
class Framing:
    """A request whose head and body are put together by hand."""

    place: Place
    path: str
    body: bytes

    def head(self, *headers: str, line: str = "") -> bytes:
        """With the usual headers, and these."""
        return head(self.place, line or f"POST {self.path} HTTP/1.1", _JSON_TYPE, *headers)

    def chunked(self, size: int = 0, extension: str = "") -> bytes:
        """The body in chunks."""
        size = size or len(self.body)
        cut = [self.body[at : at + size] for at in range(0, len(self.body), size)]
        chunks = (b"%x%s\r\n%s\r\n" % (len(one), extension.encode(), one) for one in cut)
        return b"".join(chunks) + b"0\r\n\r\n"

    @property
    def length(self) -> str:
        """The header that tells it."""
        return f"Content-Length: {len(self.body)}"

    @property
    def alone(self) -> bytes:
        """The whole request, as it would be smuggled in."""
        return self.head(self.length) + self.body


BEHIND_HEALTH = "framing: a request behind health"
_JSON_TYPE = "Content-Type: application/json"
_CHUNKED = "Transfer-Encoding: chunked"

# A request put together by hand.
FRAMED: Mapping[str, Callable[[Framing], bytes]] = {
    "framing: chunked": lambda it: it.head(_CHUNKED) + it.chunked(),
    "framing: a chunk for each byte": lambda it: it.head(_CHUNKED) + it.chunked(1),
    "framing: chunk extensions": lambda it: it.head(_CHUNKED) + it.chunked(7, ";a=b"),
    "framing: length and chunked": lambda it: it.head(it.length, _CHUNKED) + it.chunked(),
    "framing: chunked and length": lambda it: it.head(_CHUNKED, "Content-Length: 5") + it.chunked(),
    "framing: an end within the length": lambda it: (
        it.head("Content-Length: 5", _CHUNKED) + b"0\r\n\r\n" + it.alone
    ),
    "framing: two lengths": lambda it: it.head("Content-Length: 2", it.length) + it.body,
    "framing: two lengths in one": lambda it: it.head(f"{it.length}, 2") + it.body,
    "framing: length with a sign": lambda it: it.head(f"Content-Length: +{len(it.body)}") + it.body,
    "framing: length below nothing": lambda it: it.head("Content-Length: -1") + it.body,
    "framing: length in hexadecimal": lambda it: (
        it.head(f"Content-Length: 0x{len(it.body):x}") + it.body
    ),
    "framing: length with an underscore": lambda it: it.head("Content-Length: 1_0") + it.body,
    "framing: no length": lambda it: it.head() + it.body,
    "framing: length of nothing": lambda it: it.head("Content-Length: 0") + it.alone,
    "framing: chunked, misspelled": lambda it: (
        it.head("Transfer-Encoding: xchunked") + it.chunked()
    ),
    "framing: chunked, a space before the colon": lambda it: (
        it.head("Transfer-Encoding : chunked") + it.chunked()
    ),
    "framing: chunked, a tab in front": lambda it: (
        it.head("Transfer-Encoding:\tchunked") + it.chunked()
    ),
    "framing: chunked, a control character": lambda it: (
        it.head("Transfer-Encoding: \x0bchunked") + it.chunked()
    ),
    "framing: chunked, in quotes": lambda it: (
        it.head('Transfer-Encoding: "chunked"') + it.chunked()
    ),
    "framing: chunked on a folded line": lambda it: (
        it.head("Transfer-Encoding:\r\n chunked") + it.chunked()
    ),
    "framing: chunked behind a folded line": lambda it: (
        it.head("X: a\r\n Transfer-Encoding: chunked", it.length) + it.body
    ),
    "framing: chunked twice": lambda it: it.head(_CHUNKED, _CHUNKED) + it.chunked(),
    "framing: chunked and identity": lambda it: (
        it.head("Transfer-Encoding: chunked, identity") + it.chunked()
    ),
    "framing: gzip and chunked": lambda it: (
        it.head("Transfer-Encoding: gzip, chunked") + it.chunked()
    ),
    "framing: chunked of HTTP/1.0": lambda it: (
        it.head(_CHUNKED, line=f"POST {it.path} HTTP/1.0") + it.chunked()
    ),
    "framing: chunk size with a sign": lambda it: it.head(_CHUNKED) + b"+" + it.chunked(),
    "framing: chunk size with 0x": lambda it: it.head(_CHUNKED) + b"0x" + it.chunked(),
    "framing: chunk size beyond 64 bits": lambda it: (
        it.head(_CHUNKED) + b"1" + b"0" * 24 + it.chunked()
    ),
    "framing: chunks with bare line feeds": lambda it: (
        it.head(_CHUNKED) + it.chunked().replace(b"\r\n", b"\n") + b"\r\n\r\n"
    ),
    "framing: chunk longer than told": lambda it: (
        it.head(_CHUNKED) + b"2\r\n" + it.body + b"\r\n0\r\n\r\n"
    ),
    "framing: head with bare line feeds": lambda it: (
        it.head(it.length).replace(b"\r\n", b"\n") + it.body
    ),
    "framing: head with bare carriage returns": lambda it: (
        it.head("X: a\rTransfer-Encoding: chunked\rY: b", it.length) + it.body
    ),
    "framing: null byte in a header": lambda it: it.head("X: a\x00b", it.length) + it.body,
    "framing: space in front of the request": lambda it: b" " + it.alone,
    "framing: empty lines in front": lambda it: b"\r\n\r\n" + it.alone,
    "framing: a request behind a request": lambda it: (
        it.head("Content-Length: 2").replace(b"Connection: close\r\n", b"") + b"{}" + it.alone
    ),
    BEHIND_HEALTH: lambda it: (
        it.head(line="GET /health HTTP/1.1").replace(b"Connection: close\r\n", b"") + it.alone
    ),
    "framing: a request in another's body": lambda it: (
        it.head(f"Content-Length: {len(it.alone)}", line="GET /health HTTP/1.1") + it.alone
    ),
    "framing: text in the trailer": lambda it: (
        it.head(_CHUNKED, "Trailer: X-Messages") + it.chunked()[:-2] + b"X-Messages: a\r\n\r\n"
    ),
    "framing: length in the trailer": lambda it: (
        it.head(_CHUNKED) + it.chunked()[:-2] + b"Content-Length: 2\r\n\r\n"
    ),
    "connection: headers that it names": lambda it: (
        it.head(it.length, "Connection: content-length, content-type, host") + it.body
    ),
    "connection: upgrade to h2c": lambda it: (
        it.head(
            it.length, "Upgrade: h2c", "Connection: upgrade, http2-settings", "HTTP2-Settings: "
        )
        + it.body
    ),
    "connection: HTTP/2 without being asked": lambda it: (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + it.alone
    ),
    "connection: HTTP/0.9": lambda it: f"POST {it.path}\r\n\r\n".encode() + it.body,
    "connection: HTTP/3.0": lambda it: (
        it.head(it.length, line=f"POST {it.path} HTTP/3.0") + it.body
    ),
    "connection: expects to be told to go on": lambda it: (
        it.head(it.length, "Expect: 100-continue") + it.body
    ),
    "connection: expects something else": lambda it: it.head(it.length, "Expect: a") + it.body,
    "connection: two hosts": lambda it: it.head(it.length, "Host: other.example") + it.body,
    "connection: a web socket": lambda it: (
        it.head(
            *("Upgrade: websocket", "Connection: upgrade", "Sec-WebSocket-Version: 13"),
            *("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", it.length),
            line=f"GET {it.path} HTTP/1.1",
        )
        + it.body
    ),
}
