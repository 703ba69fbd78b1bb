"""Several guards on real sockets that die, drain, hang and come back as a test wants it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2
from guard_middleware.calls import SERVICE
from tests.middleware.fake_service import FakeService, verdict

LIMIT_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Replica:
    """One guard; it keeps its address when it comes back."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self.service = FakeService(answer=self._answer)
        self.lets_answer = threading.Event()
        self.lets_answer.set()
        with socket.create_server((host, 0)) as free:
            self.port: int = free.getsockname()[1]
        self._server: Any = None
        self._health: Any = None

    @property
    def address(self) -> str:
        """Where it serves."""
        return f"{self._host}:{self.port}"

    @property
    def asked(self) -> int:
        """Calls that have come, those of before a death too."""
        return len(self.service.asked)

    def start(self) -> None:
        """Serve, or serve again."""
        self._server = grpc.server(futures.ThreadPoolExecutor(32))
        guard_pb2_grpc.add_GuardServiceServicer_to_server(self.service, self._server)
        self._health = health.HealthServicer()
        self.says(SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        assert self._server.add_insecure_port(self.address)
        self._server.start()

    def says(self, state: Any) -> None:
        """What its health service tells."""
        self._health.set(SERVICE, state)

    def die(self) -> None:
        """At once: calls under way are lost."""
        self.lets_answer.set()
        if self._server is not None:
            self._server.stop(None).wait()
        self._server = None

    def hang(self) -> None:
        """Take calls and answer none of them, and go on saying that all is well."""
        self.lets_answer.clear()

    def _answer(self, request: guard_pb2.ClassifyRequest) -> verdict_pb2.Verdict:
        self.lets_answer.wait(LIMIT_S)
        return verdict()


@contextmanager
def replicas(count: int = 3) -> Iterator[list[Replica]]:
    """So many, all serving."""
    made = [Replica() for _ in range(count)]
    try:
        for one in made:
            one.start()
        yield made
    finally:
        for one in made:
            one.die()


def target_of(guards: list[Replica]) -> str:
    """The target that names them all."""
    return "ipv4:" + ",".join(one.address for one in guards)


def until(met: Callable[[], bool], doing: Callable[[], object]) -> None:
    """Do something again and again until a condition holds; fails when it never does."""
    for _ in range(100_000):
        if met():
            return
        doing()
    raise AssertionError("it never came to be")
