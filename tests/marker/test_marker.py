"""A marker in everything that is sent is in nothing that is told: logs at level debug, gRPC's own
among them, metrics, traces, audit lines, error texts of every
surface.

A caller's own `x-request-id` and `tracestate` are there to be found again, so they are not tried.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from guard_middleware.conformance.run import deployment
from guard_service.security.tokens import digest_of
from tests.chaos.processes import Process, free_ports
from tests.chaos.stage import asked, ready_at
from tests.marker.sending import GOOD, OLD, UNSAFE, answered, as_strangers, over_grpc
from tests.marker.upstream import ADDRESS, MARKER, Upstream
from tests.service.traced import receiving

SILENT_S = 1.0  # some attempts wait for an answer that never comes


@dataclass
class Told:
    """Everything that was told, by who told it."""

    texts: dict[str, str] = field(default_factory=dict)
    answers: list[tuple[str, bytes]] = field(default_factory=list)  # over HTTP, by case
    arrived: int = 0


def marks(text: str) -> list[str]:
    """The spellings of the marker that are in a text."""
    raw = MARKER.encode()
    spelled = {"plain": MARKER, "hexadecimal": raw.hex()}
    for at in range(3):  # where in a group of three bytes it begins
        coded = base64.b64encode(b"\0" * at + raw + b"\0\0").decode()
        spelled[f"base64 at {at}"] = coded[4 if at else 0 : 12]
    return [name for name, one in spelled.items() if one.lower() in text.lower()]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    yield asyncio.run(everything(tmp_path_factory.mktemp("marker")))


async def everything(folder: Path) -> Told:
    """All that guard, sidecar and application tell of what they are sent."""
    told, upstream = Told(), Upstream()
    server = await asyncio.start_server(upstream.talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with receiving() as (receiver, collector):
        processes, ports = started(folder, f"http://127.0.0.1:{port}", collector)
        async with server:
            await sent(told, processes, ports, folder)
        told.texts["traces"] = "\n".join(map(str, receiver.spans))
        assert receiver.services == {"guard-service", "guard-sidecar", "app"}
    for name in ("guard", "strict"):
        written = sorted((folder / f"{name}.audit").iterdir())
        told.texts[f"audit log of {name}"] = "\n".join(one.read_text() for one in written)
    for name, process in processes.items():
        told.texts[f"log of {name}"] = process.log.read_text(errors="replace")
    told.arrived = upstream.marked
    return told


async def sent(
    told: Told, processes: dict[str, Process], ports: dict[str, int], folder: Path
) -> None:
    """Start the processes, send them all there is, end them."""
    guard = f"127.0.0.1:{ports['guard']}"
    try:
        await asyncio.gather(*(processes[name].start() for name in ("guard", "strict")))
        await asyncio.gather(*(processes[name].start() for name in ("sidecar", "app")))
        doors = ("sidecar", "app")
        places = [
            deployment(f"http://127.0.0.1:{ports[name]}", "m", timeout_s=SILENT_S) for name in doors
        ]
        both = await asyncio.gather(*(asyncio.to_thread(answered, where) for where in places))
        for name, answers in zip(doors, both, strict=True):
            told.answers += [(f"{name}: {case.name}", got) for case, got in answers]
        told.texts["errors of gRPC"] = "\n".join(await over_grpc(guard))
        strangers = await as_strangers(f"127.0.0.1:{ports['strict']}")
        assert len(strangers) == 6 and strangers[-1] == "OK"
        told.texts["errors to strangers"] = "\n".join(strangers[:-1])
        told.texts["guardctl"] = await asyncio.to_thread(from_guardctl, guard, folder)
        admin = {"guard": "http", "strict": "strict http", "sidecar": "admin", "app": "app"}
        for name, port in admin.items():
            told.texts[f"metrics of {name}"] = await asked(ports[port], "/metrics")
    finally:
        for process in reversed(processes.values()):
            await process.ended()


def started(
    folder: Path, upstream: str, collector: str
) -> tuple[dict[str, Process], dict[str, int]]:
    names = ("guard", "http", "strict", "strict http", "sidecar", "admin", "app")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    loud = {
        "GRPC_VERBOSITY": "DEBUG",
        "PYTHONASYNCIODEBUG": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
        "OTEL_LOG_LEVEL": "debug",
    }
    guard = f"127.0.0.1:{ports['guard']}"
    service = ["--model", "fake-vision", "--port", str(ports["guard"]), "--log-level", "debug"]
    service += ["--metrics-port", str(ports["http"]), "--max-message-bytes", str(4 * 2**20)]
    service += ["--tracing", *audited(folder, "guard")]
    sidecar = ["--upstream", upstream, "--listen", f"127.0.0.1:{ports['sidecar']}"]
    sidecar += ["--admin", f"127.0.0.1:{ports['admin']}", "--guard", guard, "--log-level", "debug"]
    sidecar += ["--tracing", "on"]
    app = ["tests.marker.app:app", "--port", str(ports["app"]), "--log-level", "debug"]
    app += ["--no-access-log"]  # which is the server's own, and holds addresses
    environment = {**loud, "GUARDED_GUARD": guard, "GUARDED_TRACING": "on", ADDRESS: upstream}
    knows = strict(folder, ports)
    ready = {name: ready_at(ports[name], "/readyz") for name in ("http", "strict http")}
    made = [
        Process("strict", "guard_service", knows, folder, ready["strict http"], loud),
        Process("guard", "guard_service", service, folder, ready["http"], loud),
        Process(
            "sidecar", "guard_middleware", sidecar, folder, ready_at(ports["admin"], "/livez"), loud
        ),
        Process("app", "uvicorn", app, folder, ready_at(ports["app"], "/metrics"), environment),
    ]
    return {one.name: one for one in made}, ports


def strict(folder: Path, ports: dict[str, int]) -> list[str]:
    """Flags of a guard that knows its callers by token."""
    good, old = digest_of(GOOD.removeprefix("Bearer ")), digest_of(OLD)
    tokens = [{"digest": good}, {"digest": old, "expires": "2020-01-01"}]
    auth = folder / "auth.yaml"
    auth.write_text(json.dumps({"tenants": {"callers": {"tokens": tokens}}}))
    flags = {"model": "fake", "port": ports["strict"], "metrics-port": ports["strict http"]}
    flags |= {"auth": auth, "log-level": "debug"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, *audited(folder, "strict")]


def audited(folder: Path, name: str) -> list[str]:
    """Flags of a guard that keeps an audit log, without payloads."""
    key = folder / "audit.key"
    key.write_text("5a" * 32)
    return ["--audit", str(folder / f"{name}.audit"), "--audit-key", str(key)]


def from_guardctl(guard: str, folder: Path) -> str:
    """What guardctl says of lines, conversations and images that are wrong, and writes of them."""
    lines = [
        f'{{"id": 1, "text": "{MARKER}',
        json.dumps({"id": 2, MARKER: MARKER}),
        json.dumps({"id": 3, "text": {MARKER: MARKER}}),
        json.dumps({"id": 4, "messages": [{"role": MARKER, "content": MARKER}]}),
        json.dumps({"id": 5, "messages": [{"role": "user", "content": [{"type": MARKER}]}]}),
        json.dumps({"id": 6, "text": MARKER * 60_000}),
        json.dumps({"id": 7, "text": UNSAFE, "language": MARKER}),
        json.dumps([MARKER]),
    ]
    source, result = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines))
    wrong = folder / "wrong.json"
    wrong.write_text(json.dumps([{"role": MARKER, "content": MARKER}]))
    image = folder / "image.png"
    image.write_bytes(MARKER.encode())
    said = [
        _ran("bulk", str(source), str(result), "--server", guard),
        _ran("check", "--server", guard, "--file", str(wrong)),
        _ran("check", "--server", guard, "--image", str(image)),
        _ran("check", "--server", guard, UNSAFE),
    ]
    return "\n".join([*said, result.read_text()])


def _ran(*arguments: str) -> str:
    command = [sys.executable, "-c", "from guard_service.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "where",
    [
        *("log of guard", "log of strict", "log of sidecar", "log of app"),
        *("metrics of guard", "metrics of strict", "metrics of sidecar", "metrics of app"),
        *("audit log of guard", "audit log of strict"),
        *("errors of gRPC", "errors to strangers", "guardctl", "traces"),
    ],
)
def test_marker_is_not_in(told: Told, where: str) -> None:
    text = told.texts[where]
    assert text
    lines = [line[:300] for line in text.splitlines() if marks(line)]
    assert not lines, f"{len(lines)} lines of the {where}: " + "\n".join(lines[:20])


def test_marker_is_in_no_refusal(told: Told) -> None:
    """But for the name of the model, which is told to whoever asked for it, as the protocol wants;
    what was allowed is no refusal."""
    assert len(told.answers) > 500
    marked = []
    for name, raw in told.answers:
        at = max(raw.rfind(b"HTTP/1.1 "), 0)  # the last answer on the connection
        answer = raw[at:].replace(b'"model":"%s"' % MARKER.encode(), b"")
        judged = b"x-guard-verdict-id" in answer and b"content_filter" not in answer
        streamed = b"text/event-stream" in answer  # what came before the refusal was allowed
        if not judged and not streamed and marks(answer.decode(errors="replace")):
            marked.append(f"{name}: {answer[:400]!r}")
    assert not marked, "\n".join(marked)


def test_marker_went_all_the_way(told: Told) -> None:
    """What is sent is sent, and what is told is told at level debug."""
    assert told.arrived > 100
    assert any(marks(raw.decode(errors="replace")) for _, raw in told.answers)
    assert told.texts["audit log of guard"].count('"kind":"verdict"') > 100
    assert told.texts["log of guard"].count('"message": "call"') > 100
    assert told.texts["log of sidecar"].count("exchange ") > 100
    assert "using self-pipe" in told.texts["log of sidecar"].lower() or "selector" in (
        told.texts["log of sidecar"].lower()
    )


@pytest.mark.parametrize("at", range(3))
def test_marker_is_found_in_every_spelling(at: int) -> None:
    data = b"x" * at + MARKER.encode() + b"xyz"
    assert marks(base64.b64encode(data).decode()) and marks(f"a {data.hex()} b")
    assert marks(f"{MARKER.lower()}") and not marks("nothing")
