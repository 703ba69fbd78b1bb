"""The command: what SIGHUP does to it, while it starts and while it serves."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc

from guard_api.v1 import guard_pb2_grpc
from tests.service.asking import PATIENCE_S, asked
from tests.service.test_shutdown import _serving, service

POLICY = "name: shop\nversion: '%s'\n"


async def test_sighup_has_changed_policies_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "shop.yaml").write_text(POLICY % 1)
    host = f"unix:{tmp_path / 'socket'}"
    flags = ("--host", host, "--policies", str(folder), "--reload-s", "0", "--log-format", "json")
    with service(*flags) as process:
        address = await asyncio.to_thread(_serving, process)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = guard_pb2_grpc.GuardServiceStub(channel)
            request = asked("hi", policy="shop")
            assert (await stub.Classify(request)).verdict.policy.version == "1"
            (folder / "shop.yaml").write_text(POLICY % 2)
            process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(PATIENCE_S):
                while (await stub.Classify(request)).verdict.policy.version != "2":
                    await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
