"""A model hub on this machine, which can be made to lie: as much of one as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "meta-llama/Llama-Guard-3-1B"
COMMIT = "c0ffee" + "0" * 34
WEIGHTS = bytes(range(256)) * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}' + b" " * 300,
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "LICENSE.txt": b"the licence",
    "USE_POLICY.md": b"the policy",
    "README.md": b"# a model",
}
UNWANTED = {
    ".gitattributes": b"*",
    "pytorch_model.bin": b"a pickle",
    "modeling_llama.py": b"import os",
    "original/consolidated.00.pth": b"a pickle",
    "original/tokenizer.model": b"ranks",
    "onnx/model.safetensors": b"elsewhere",
    "LICENSE.py": b"import os",
}
Answer = Callable[["Request"], None]


class FakeHub:
    """One repository. `answers` puts another answer in the place of a path's own."""

    def __init__(self, repository: str, files: dict[str, bytes], token: str | None = None) -> None:
        self.repository, self.files, self.commit = repository, files, COMMIT
        self.token = token  # without it, files are refused as a gated repository's are
        self.large = 256  # files from this size on are listed with a sha256, as LFS has them
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.closing = threading.Event()
        self.endpoint = ""

    def listing(self) -> dict[str, Any]:
        """What /api/models/... says of the repository."""
        return {
            "id": self.repository,
            "sha": self.commit,
            "gated": "manual" if self.token else False,
            "siblings": [self.entry(name, body) for name, body in self.files.items()],
        }

    def entry(self, name: str, body: bytes) -> dict[str, Any]:
        lfs = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        entry = {"rfilename": name, "size": len(body), "blobId": blob_of(body)}
        return {**entry, "lfs": lfs} if len(body) >= self.large else entry

    def etag(self, body: bytes) -> str:
        return hashlib.sha256(body).hexdigest() if len(body) >= self.large else blob_of(body)

    def file_path(self, name: str) -> str:
        return f"/{self.repository}/resolve/{self.commit}/{name}"

    @property
    def list_path(self) -> str:
        return f"/api/models/{self.repository}/revision/main"

    def lie(self, **changed: Any) -> None:
        """List the repository with other values in the answer."""
        self.answers[self.list_path] = lambda ask: ask.send_json({**self.listing(), **changed})

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        """On a free port of this machine, until the block ends."""

        class Bound(Request):
            hub = self

        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            server.shutdown()
            server.server_close()
            thread.join()


def blob_of(body: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


class Request(BaseHTTPRequestHandler):
    """A request to the hub, and the ways of answering it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # heads and bodies are written apart
    hub: FakeHub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked has heard enough
            super().handle()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, self.path, dict(self.headers.items())))
        self.hub.answers.get(path, Request.answer)(self)

    def answer(self) -> None:
        """What an honest hub says."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{hub.repository}"):
            if path.rpartition("/")[2] not in ("main", hub.commit, hub.repository.split("/")[1]):
                return self.refuse(404, "RevisionNotFound")
            return self.send_json(hub.listing())
        for revision in ("main", hub.commit):
            name = path.removeprefix(f"/{hub.repository}/resolve/{revision}/")
            if name in hub.files:
                return self.send_file(hub.files[name])
        self.refuse(404, "EntryNotFound" if hub.repository in path else "RepoNotFound")

    def send_file(self, body: bytes) -> None:
        authorization = self.headers.get("authorization")
        if self.hub.token and authorization != f"Bearer {self.hub.token}":
            return self.refuse(403 if authorization else 401, "GatedRepo")
        headers = {"ETag": f'"{self.hub.etag(body)}"', "X-Repo-Commit": self.hub.commit}
        first, _, last = self.headers.get("range", "").removeprefix("bytes=").partition("-")
        if not first:
            return self.send(200, body, headers)
        part = body[int(first) : int(last) + 1 if last else None]
        if not part:
            return self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(body)}"})
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self.send(206, part, {**headers, "Content-Range": span})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        """The head of an answer; what follows is the caller's."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_json(self, document: object) -> None:
        self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, said: str = "no") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": said}
        self.send(status, json.dumps({"error": said}).encode(), headers)

    def redirect(self, to: str) -> None:
        self.send(302, b"", {"Location": to})

    def send_endlessly(self) -> None:
        """Chunks for as long as someone takes them."""
        self.begin(200, {"Transfer-Encoding": "chunked"})
        while not self.hub.closing.is_set():
            self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def break_off(self, body: bytes, after: int) -> None:
        """Promise all of the body, send a part of it, hang up."""
        self.begin(200, {"Content-Length": str(len(body))})
        self.wfile.write(body[:after])
        self.close_connection = True

    def stay_silent(self) -> None:
        self.hub.closing.wait()
        self.close_connection = True
