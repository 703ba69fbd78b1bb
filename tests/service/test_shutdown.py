"""The end of a server: nothing accepted is lost, and the command's exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard_api.v1 import guard_pb2_grpc
from guard_service import __main__ as command
from tests.service.asking import asked, piece, refused, start, until
from tests.service.conftest import RunGuard
from tests.service.test_moderation import Held

ROOT = Path(__file__).parents[2]
CALLERS = 16


async def test_accepted_calls_end_with_verdicts_and_new_ones_are_refused(
    run_guard: RunGuard,
) -> None:
    engine = Held()
    guard = await run_guard(engine)
    stream = guard.stub.ClassifyStream()
    await stream.write(start("hi"))
    await stream.write(piece("so far", check=True))
    assert not (await stream.read()).final
    engine.gate.clear()
    calls = [guard.stub.Classify(asked(f"call {n}")) for n in range(5)]
    await until(lambda: guard.server.batcher.queued_items + engine.saw("call") == 5)
    stopping = asyncio.create_task(guard.server.stop(20))
    await asyncio.sleep(0)
    refusal = await refused(guard.stub.Classify(asked("too late")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    engine.gate.set()
    assert all([(await call).verdict.verdict_id for call in calls])
    await stream.write(piece(" and on", end=True))
    assert (await stream.read()).final
    assert await stopping


async def test_calls_that_outlast_the_drain_are_told(run_guard: RunGuard) -> None:
    engine = Held()
    guard = await run_guard(engine)
    engine.gate.clear()
    call = guard.stub.Classify(asked("slow"))
    await until(lambda: engine.saw("slow") == 1)
    stopping = asyncio.create_task(guard.server.stop(0.05))
    refusal = await refused(call)
    engine.gate.set()
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert not await stopping


@contextmanager
def service(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "guard_service", "--model", "fake", "--no-metrics", *flags],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _serving(process: subprocess.Popen[str]) -> str:
    """The address, once it serves."""
    assert process.stderr is not None
    for line in process.stderr:
        entry = json.loads(line)
        if entry["message"] == "serving":
            return str(entry["address"])
    raise AssertionError("it never served")


@dataclass(slots=True)
class _Caller:
    """Asks, call after call, until it is refused; `codes` is what it got."""

    stub: guard_pb2_grpc.GuardServiceAsyncStub
    name: str
    codes: list[str] = field(default_factory=list)

    async def ask_until_refused(self) -> None:
        while not self.codes or self.codes[-1] == "OK":
            try:
                await self.stub.Classify(asked(f"{self.name} {len(self.codes)}"), timeout=60)
                self.codes.append("OK")
            except grpc.aio.AioRpcError as error:
                self.codes.append(error.code().name)


async def test_sigterm_under_load_loses_no_call(tmp_path: Path) -> None:
    with service("--host", f"unix:{tmp_path / 'socket'}", "--log-format", "json") as process:
        address = await asyncio.to_thread(_serving, process)
        rest = asyncio.create_task(asyncio.to_thread(process.communicate))
        async with grpc.aio.insecure_channel(address) as channel:
            stub = guard_pb2_grpc.GuardServiceStub(channel)
            callers = [_Caller(stub, f"caller {n}") for n in range(CALLERS)]
            asking = [asyncio.create_task(caller.ask_until_refused()) for caller in callers]
            await until(lambda: sum(len(caller.codes) for caller in callers) > 2 * CALLERS)
            process.send_signal(signal.SIGTERM)
            await asyncio.gather(*asking)
        _, log = await rest
    assert process.returncode == 0
    assert {caller.codes[-1] for caller in callers} == {"UNAVAILABLE"}
    lines = [json.loads(line) for line in log.splitlines()]
    served = sum(line.get("code") == "OK" for line in lines)
    assert served == sum(caller.codes.count("OK") for caller in callers)
    assert {line["code"] for line in lines if "code" in line} == {"OK", "UNAVAILABLE"}
    assert lines[-1]["message"] == "stopped" and lines[-1]["drained"] is True


async def test_a_second_signal_ends_the_process_now(tmp_path: Path) -> None:
    with service("--host", f"unix:{tmp_path / 'socket'}", "--log-format", "json") as process:
        address = await asyncio.to_thread(_serving, process)
        async with grpc.aio.insecure_channel(address) as channel:
            stream = guard_pb2_grpc.GuardServiceStub(channel).ClassifyStream()
            await stream.write(start("hi"))
            await stream.write(piece("open", check=True))
            await stream.read()
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait) == command.INTERRUPTED


def test_a_taken_port_ends_the_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert command.main(["--model", "fake", "--no-metrics", "--port", port]) == command.FAILED
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in told
    assert "Traceback" not in told


def test_a_broken_policy_ends_the_command_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nversion: "1"\ndescription: x\nmod: shadow\n', encoding="utf-8")
    assert command.main(["--model", "fake", "--policies", str(tmp_path)]) == command.USAGE
    assert f"{path}:4:1: " in capsys.readouterr().err


def test_a_folder_without_a_model_ends_the_command_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--model", str(tmp_path)]) == command.FAILED
    told = capsys.readouterr().err
    assert "the model cannot be loaded" in told and str(tmp_path) in told


def test_wrong_settings_end_the_command_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--port", "70000", "--threads", "x"]) == command.USAGE
    told = capsys.readouterr().err
    assert "port: 70000" in told and "threads: 'x'" in told
    with pytest.raises(SystemExit) as caught:
        command.main(["--modle", "x"])
    assert caught.value.code == command.USAGE
    assert "did you mean --model?" in capsys.readouterr().err


def test_print_config_shows_values_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--print-config", "--port", "7"]) == 0
    told = capsys.readouterr().out
    assert "port: 7" in told and "# flag: " in told and "# default: " in told
