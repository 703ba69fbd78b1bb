"""guardctl bench middleware: what is measured, what is compared with what, and how it is told."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from guard_middleware import GuardMiddleware
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from guard_service.cli import bench_middleware, bench_streams
from guard_service.cli.app import app
from guard_service.cli.bench_http import Connection
from guard_service.cli.bench_middleware_app import (
    CHAT,
    GAUGE,
    GO_ON,
    PLAIN,
    bare,
    chunks,
    guarded,
    question,
    stream_body,
    whole_reply,
)
from guard_service.cli.bench_middleware_table import show
from guard_service.cli.bench_servers import Server
from tests.middleware.asgi_calls import EVENTS, Backend, listening


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("factory", [bare, guarded])
async def test_backend_says_the_same_bare_and_guarded(factory: Any) -> None:
    async with listening(factory()) as address:
        connection = await Connection.open(port_of(address))
        for _ in range(2):  # on one connection
            whole = await connection.ask(CHAT, question(9, streamed=False))
            stream = await connection.ask(CHAT, question(9, streamed=True))
            paced = await connection.ask(f"{CHAT}?pause_ms=1", question(9, streamed=True))
        plain = await connection.ask(PLAIN)
        connection.close()
    assert (whole.status, whole.body) == (200, whole_reply(9))
    assert stream.body == paced.body == stream_body(9)
    assert 0 < stream.first_s <= stream.whole_s
    assert plain.body == b"plain"


async def test_streams_wait_until_they_are_told_and_the_gauge_counts_them() -> None:
    async with listening(guarded()) as address:
        port = port_of(address)
        waiting, other = [await Connection.open(port) for _ in range(2)]
        await waiting.send(f"{CHAT}?waits=1", question(60, streamed=True))
        begun: list[bool] = []
        while not begun:
            gauge = (await other.ask(GAUGE)).body
            begun += [True] * (b'"open": 1' in gauge)
        await other.ask(GO_ON, b"{}")
        got = await waiting.receive(0.0)
        waiting.close()
        other.close()
    assert got.body == stream_body(60)


@pytest.mark.parametrize("factory", [bare, guarded])
async def test_many_streams_are_held_in_their_middle_and_then_finished(factory: Any) -> None:
    async with listening(factory()) as address:
        server = Server("here", port_of(address), ThisProcess())  # type: ignore[arg-type]
        streams = bench_streams._Streams(server, f"{CHAT}?pause_ms=1&waits=1", 24)
        await streams.open(7)
        await streams.wait()  # none of them has been let go on too early, and waits for ever
        gauge = await bench_streams._gauge(server)
        await bench_streams._ask(server, GO_ON, b"{}")
        ended = await streams.ended()
    assert (gauge["open"], gauge["waiting"]) == (7, 7)
    assert ended == {"finished": 7}


@pytest.mark.parametrize("words", ["moderate", "model, A moderate answer of a model, A"])
async def test_streams_that_a_guard_cuts_are_told_apart(words: str) -> None:
    app = GuardMiddleware(bare(), FakeGuard(forbids(words)), metrics=Metrics(CollectorRegistry()))
    async with listening(app) as address:
        server = Server("here", port_of(address), ThisProcess())  # type: ignore[arg-type]
        assert await bench_streams._Streams(server, CHAT, 60).all(2) == {"filtered": 2}


class ThisProcess:
    """Has the number of one."""

    pid = os.getpid()


@pytest.mark.parametrize(
    ("between", "end"), [(b":\n\n", "finished"), (b": no\n\n", "unequal"), (b"", "finished")]
)
async def test_signs_of_life_do_not_make_a_stream_another(between: bytes, end: str) -> None:
    said = list(chunks(9))
    backend = Backend([*said[:5], between, *said[5:], b"data: [DONE]\n\n"], EVENTS)
    async with listening(backend) as address:
        server = Server("here", port_of(address), ThisProcess())  # type: ignore[arg-type]
        assert await bench_streams._Streams(server, CHAT, 9).all(2) == {end: 2}


async def test_reply_that_breaks_off_is_an_error() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    async with server:
        connection = await Connection.open(server.sockets[0].getsockname()[1])
        with pytest.raises(EOFError):
            await connection.ask(PLAIN)
        connection.close()


def test_ratios_and_differences_are_taken_turn_by_turn() -> None:
    bare = [{"p50_ms": 1.0, "requests_per_s": 100.0}, {"p50_ms": 3.0, "requests_per_s": 50.0}]
    ours = [{"p50_ms": 2.0, "requests_per_s": 50.0}, {"p50_ms": 6.0, "requests_per_s": 30.0}]
    assert bench_middleware._summary(ours, bare) == {
        "p50_ms": 4.0,
        "added_p50_ms": 2.0,
        "requests_per_s": 40.0,
        "requests_per_s_ratio": 0.55,
    }


STREAMS = {
    "finished": 5,
    "filtered": 0,
    "refused": 0,
    "lost": 0,
    "unequal": 0,
    "kib_per_stream": 8.0,
} | {
    "added_kib_per_stream": 40.0,
    "sockets_left": 0,
    "left": {"told_to_backend": 5, "open_at_backend": 0, "sockets_left": 0},
}
DRAIN = {"finished": 5, "filtered": 0, "refused": 0, "lost": 0, "unequal": 0, "exit_code": 0} | {
    "seconds": 3.0,
    "open_at_backend": 0,
}


def report(**drain: int) -> dict[str, Any]:
    figures = {"p50_ms": 1.0, "added_p50_ms": 0.25, "requests_per_s_ratio": 0.9}
    return {
        "cores": 2,
        "repeats": 3,
        "paced_ms": 20,
        "variants": [
            {"name": "bare", **figures, "streams": STREAMS},
            {"name": "middleware, starter guard", "added_first_ms": -1.0},
            {"name": "sidecar", **figures, "streams": STREAMS},
        ],
        "drain": DRAIN | drain,
    }


def test_table_tells_ratios_and_what_became_of_streams(capsys: pytest.CaptureFixture[str]) -> None:
    show(report())
    told = capsys.readouterr().out
    assert "1.00 ms" in told and "+0.25 ms" in told and "0.90x" in told and "-1.0 ms" in told
    assert "+40 KiB" in told and "finished 5, filtered 0, refused 0, lost 0, unequal 0" in told
    assert "exit code 0" in told


@pytest.mark.parametrize(("what", "well"), [("lost", False), ("unequal", False), ("other", True)])
def test_a_stream_that_was_lost_tells_in_the_exit_code(what: str, well: bool) -> None:
    assert bench_middleware._faithful(report(**{what: 1})) is well


def test_middleware_is_one_of_the_things_that_bench_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[bench_middleware.Plan] = []

    def ran(plan: bench_middleware.Plan, as_json: bool) -> int:
        plans.append(plan)
        return 0

    monkeypatch.setattr(bench_middleware, "run", ran)
    asked = ["bench", "middleware", "--streams", "7", "--repeats", "2", "-c", "3", "-d", "4"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    assert plans == [bench_middleware.Plan(2, 200, 3, 4.0, 7)]


def test_no_streams_are_opened_where_none_are_wanted() -> None:
    assert asyncio.run(bench_streams.opened(0, {})) == {}
