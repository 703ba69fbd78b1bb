"""The command guard-ext-proc: health, readiness, metrics, its end, its mistakes."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from guard_middleware.ext_proc.__main__ import main
from guard_middleware.ext_proc.server import Places, Server
from guard_middleware.ext_proc.service import SERVICE
from guard_middleware.ext_proc.tls import credentials
from guard_middleware.metrics import Metrics
from guard_middleware.settings import Settings
from guard_middleware.testing import FakeGuard
from tests.middleware.ext_proc.real_envoy import serving
from tests.middleware.test_client import certificate

SERVING = health_pb2.HealthCheckResponse.SERVING


class Sleeping(FakeGuard):
    """A guard that would not judge."""

    async def ready(self) -> bool:
        return False


def server_in(folder: Path, guard: FakeGuard) -> Server:
    places = Places(f"unix:{folder / 'listen'}", f"unix:{folder / 'admin'}")
    return Server(places, Settings(), guard, Metrics(CollectorRegistry()))


def administrator(folder: Path) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(folder / "admin"))
    return httpx.AsyncClient(transport=transport, base_url="http://admin", timeout=60)


async def told(client: httpx.AsyncClient, path: str) -> tuple[int, str]:
    """What the administration answers, once it listens."""
    async with asyncio.timeout(60):
        while True:
            try:
                got = await client.get(path)
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
            else:
                return got.status_code, got.text


@pytest.mark.parametrize(
    ("guard", "ready"), [(FakeGuard(), (200, "guard ok\n")), (Sleeping(), (503, "guard down\n"))]
)
async def test_health_is_the_processors_own_and_readiness_the_guards_too(
    guard: FakeGuard, ready: tuple[int, str], tmp_path: Path
) -> None:
    async with serving(server_in(tmp_path, guard)), administrator(tmp_path) as client:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'listen'}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == SERVING
        assert await told(client, "/readyz") == ready
        assert await told(client, "/livez") == (200, "ok\n")
        status, text = await told(client, "/metrics")
        assert status == 200 and "python_info" in text
        assert (await told(client, "/"))[0] == 404


async def test_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'listen'}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "guard_middleware.ext_proc", "--listen", listen),
        *("--admin", f"unix:{tmp_path / 'admin'}", "--guard", f"unix:{tmp_path / 'nobody'}"),
    )
    try:
        async with grpc.aio.insecure_channel(listen) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = await health.Check(request, wait_for_ready=True, timeout=60)
        assert answer.status == SERVING
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--prompt-check", "beside"], "prompt_check"),
        (["--mode", "sometimes"], "mode"),
        (["--admin", "nowhere"], "nowhere: must be host:port or unix:/path"),
    ],
)
def test_mistakes_are_told_at_the_start(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert problem in capsys.readouterr().err


def test_tls_files_are_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key = certificate(tmp_path, "server")
    for flags, problem in (
        (["--tls-certificate", str(cert)], "tls_key"),
        (["--tls-clients", str(cert)], "tls_certificate"),
        (["--tls-certificate", str(cert), "--tls-key", str(tmp_path / "none")], "No such file"),
        (["--tls-certificate", str(key), "--tls-key", str(key)], "wrong"),
    ):
        assert main(flags) == 2
        assert problem in capsys.readouterr().err


async def test_tls_is_renewed_and_asks_for_clients_certificates(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    own, own_key = certificate(tmp_path, "client")
    made = grpc.aio.server()
    port = made.add_secure_port(
        "localhost:0", credentials(str(cert), str(key), str(own), look_s=0.0)
    )
    await made.start()
    try:
        assert await connects(port, cert, own, own_key)
        assert not await connects(port, cert)
        first = cert.rename(tmp_path / "first.pem")
        cert.write_text("half wri")
        assert await connects(port, first, own, own_key)
        renewed, renewed_key = certificate(tmp_path, "renewed")
        key.write_bytes(renewed_key.read_bytes())
        cert.write_bytes(renewed.read_bytes())
        assert await connects(port, renewed, own, own_key)
        assert not await connects(port, first, own, own_key)
    finally:
        await made.stop(None)


async def connects(
    port: int, roots: Path, own: Path | None = None, own_key: Path | None = None
) -> bool:
    """Whether a client that trusts these roots is let in: it is told that there is nothing."""
    trusted = grpc.ssl_channel_credentials(
        roots.read_bytes(),
        own_key.read_bytes() if own_key else None,
        own.read_bytes() if own else None,
    )
    alone = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(f"localhost:{port}", trusted, alone) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNIMPLEMENTED
    return False


def test_place_that_is_taken_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "listen").mkdir()
    places = ["--listen", f"unix:{tmp_path / 'listen'}", "--admin", f"unix:{tmp_path / 'admin'}"]
    assert main([*places, "--guard", "unix:/nobody"]) == 1
    assert "cannot listen" in capfd.readouterr().err
