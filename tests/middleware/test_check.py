"""guardctl middleware check: the conformance set against deployments, guarded and not."""

from __future__ import annotations

import asyncio
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard_middleware.conformance.cases import attempts
from guard_middleware.conformance.requests import PROTOCOLS, Place
from guard_middleware.conformance.run import HARM, Outcome, check, deployment, read
from guard_middleware.messages import App, Receive, Scope, Send
from guard_middleware.testing import FakeGuard, forbids
from guard_service.cli import exits
from guard_service.cli.app import app as guardctl
from tests.middleware.asgi_calls import JSON, Backend, body_of, listening
from tests.middleware.formats.speech import Said
from tests.middleware.formats.speeches import SPEECHES
from tests.middleware.wrapped import BAD, Wrapped

RUN = CliRunner()
NAMES = {one.name for one in PROTOCOLS}


async def backend(scope: Scope, receive: Receive, send: Send) -> None:
    """Speaks every protocol, with an error for all else."""
    body = await body_of(receive)
    found: Backend = Backend([b"{}"], status=404)
    for speech in SPEECHES:
        for path, streams in ((speech.path, False), (speech.stream_path, True)):
            if _same(path, scope["path"]) and _streams(speech.stream_path, path, body) == streams:
                said = {Said(0, next(iter(speech.channels))): "Lisbon."}
                chunks = speech.events(list(said.items())) if streams else [speech.whole(said)]
                found = Backend(chunks, speech.stream_type if streams else JSON)
    await found(scope, _nothing, send)


def _same(path: str, asked: str) -> bool:
    return (
        path.startswith("/model/")
        and fnmatch.fnmatch(asked, f"/model/*/{path.rpartition('/')[2]}")
        or path == asked
    )


def _streams(stream_path: str, path: str, body: bytes) -> bool:
    return path.endswith("stream") or b'"stream":true' in body


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def checked(app: App, *options: str) -> tuple[int, str]:
    """Exit code and output of the command against an application."""
    async with listening(app, lifespan="off") as address:
        command = ["middleware", "check", "--upstream", address, *options]
        done = await asyncio.to_thread(RUN.invoke, guardctl, command)
    return done.exit_code, done.output


async def test_guarded_deployment_passes_in_every_protocol(tmp_path: Path) -> None:
    file = tmp_path / "unsafe.txt"
    file.write_text(f"{BAD}\n")
    guarded = Wrapped(backend, FakeGuard(forbids(BAD)), guarded=("/",))
    code, output = await checked(guarded, "--json", "--unsafe-text", str(file))
    told = json.loads(output)
    cases = told["cases"]
    assert code == exits.OK and told["ok"] and all(case["ok"] for case in cases)
    assert {case["protocol"] for case in cases} == NAMES
    basics = [case for case in cases if case["name"].endswith(("whole", "streamed"))]
    assert len(basics) == 4 * len(NAMES)
    assert all(case["outcome"] == ("blocked" if case["harmful"] else "answered") for case in basics)
    assert len(cases) == len(basics) + len(list(attempts(Place("x"), BAD)))
    assert BAD not in output


async def test_deployment_without_a_guard_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard_middleware.conformance.run.attempts", lambda place, harm: ())
    code, output = await checked(backend)
    lines = output.splitlines()
    assert code == exits.NO_VERDICT and lines[-1] == f"{4 * len(NAMES)} FAILED"
    assert lines[0] == "FAIL unscreened 200 openai-chat: harmless request, whole"
    assert "no guard has seen it" in output and HARM not in output


async def test_guard_that_finds_nothing_fails() -> None:
    async with listening(Wrapped(backend, FakeGuard()), lifespan="off") as address:
        results = await asyncio.to_thread(lambda: list(check(deployment(address))))
    wrong = {one.case.name for one in results if not one.ok}
    assert {"harmful request, whole", "harmful request, streamed", "coding: gzip"} <= wrong
    assert "role: system" not in wrong  # a guard may find it harmless there
    assert {one.outcome for one in results if not one.ok} == {Outcome.ANSWERED}


class Down(FakeGuard):
    """Judges nothing."""

    async def judge(self, conversations: Any) -> Any:
        raise ConnectionError


async def test_guard_that_is_down_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard_middleware.conformance.run.attempts", lambda place, harm: ())
    code, output = await checked(Wrapped(backend, Down()))
    assert code == exits.NO_VERDICT and "is the guard there, and ready?" in output
    assert "FAIL blocked    200 openai-chat: harmless request, whole" in output


async def test_deployment_that_answers_in_no_protocol_is_told() -> None:
    code, output = await checked(Backend([b"{}"], status=404))
    assert code == exits.NO_VERDICT and "--model" in output


async def test_headers_prefix_and_model_are_sent() -> None:
    behind = Backend([b"{}"])
    async with listening(behind) as address:
        where = deployment(f"{address}/llm/", "mine", ["Authorization: Bearer x"])
        await asyncio.to_thread(lambda: next(check(where)))
    scope = behind.scopes[0]
    assert scope["path"] == "/llm/v1/chat/completions" and behind.asked["model"] == "mine"
    assert (b"authorization", b"Bearer x") in scope["headers"]


async def test_deployment_that_says_nothing_is_silent() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    where = deployment(f"http://{host}:{port}", timeout_s=0.05)
    async with server:
        first = await asyncio.to_thread(lambda: next(check(where)))
    assert (first.outcome, first.status, first.ok) == (Outcome.SILENT, 0, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--upstream", "127.0.0.1:8080"], "http://host:port"),
        (["--upstream", "http://h?x=1"], "http://host:port"),
        (["--upstream", "http://h:99999"], "Port"),
        (["--upstream", "http://h", "-H", "no header"], "Name: value"),
        (["--upstream", "http://h", "-H", "A: b\r\nC: d"], "Name: value"),
        (["--upstream", "http://h", "--model", "a b"], "model"),
        (["--upstream", "http://h", "--unsafe-text", "EMPTY"], "characters"),
        (["--upstream", "http://h", "--unsafe-text", "BINARY"], "text"),
    ],
)
def test_wrong_usage_is_told(options: list[str], said: str, tmp_path: Path) -> None:
    for name, content in (("EMPTY", b" \n"), ("BINARY", b"\xff")):
        (tmp_path / name).write_bytes(content)
        options = [str(tmp_path / name) if one == name else one for one in options]
    done = RUN.invoke(guardctl, ["middleware", "check", *options])
    assert done.exit_code == exits.USAGE and said in done.output


def test_no_connection_is_told(unused_tcp_port: int) -> None:
    where = f"http://127.0.0.1:{unused_tcp_port}"
    done = RUN.invoke(guardctl, ["middleware", "check", "--upstream", where])
    assert done.exit_code == exits.NO_VERDICT and "no connection" in done.output


def answer(status: int, body: bytes = b"{}", *headers: bytes) -> bytes:
    lines = (b"HTTP/1.1 %d Any" % status, b"content-length: %d" % len(body), *headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


ID = b"X-Guard-Verdict-Id: 7"


@pytest.mark.parametrize(
    ("said", "outcome", "status"),
    [
        (b"", Outcome.REFUSED, 0),
        (b"nonsense", Outcome.REFUSED, 0),
        (answer(200), Outcome.UNSCREENED, 200),
        (answer(200, b"{}", ID), Outcome.ANSWERED, 200),
        (answer(200, b'{"finish_reason":"content_filter"}', ID), Outcome.BLOCKED, 200),
        (answer(200, b'{"stopReason":"guardrail_intervened"}', ID), Outcome.BLOCKED, 200),
        (answer(400, b'{"code":"content_filter"}', ID), Outcome.BLOCKED, 400),
        (answer(403), Outcome.REFUSED, 403),
        (answer(302), Outcome.REFUSED, 302),
        (answer(502), Outcome.REFUSED, 502),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, b"{}", ID), Outcome.ANSWERED, 200),
        (answer(400) + answer(200), Outcome.UNSCREENED, 200),
        (answer(200, b"{}", ID) + answer(200), Outcome.UNSCREENED, 200),
        (answer(200, ID), Outcome.UNSCREENED, 200),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", Outcome.UNSCREENED, 101),
    ],
)
def test_answers_are_read(said: bytes, outcome: Outcome, status: int) -> None:
    assert read(said) == (outcome, status)


def test_answers_in_front_do_not_count() -> None:
    assert read(answer(200) + answer(403), spare=1) == (Outcome.REFUSED, 403)
    assert read(answer(200), spare=1) == (Outcome.REFUSED, 0)
