"""The guard on Ray Serve: what comes through its ingress is what guard-service says itself."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_middleware import (
    GuardClient,
    GuardError,
    InvalidRequest,
    Piece,
    Retries,
    Terms,
    UnknownPolicy,
)
from guard_service.config import ConfigError, Settings
from guard_service.local import local_server

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

TIERS = """
name: tiers
version: "1"
cascade:
  band: [0.15, 0.8]
  categories: {S4: 0.05}
"""
LIMIT_S = 60.0
PATIENT = Terms(timeout_s=LIMIT_S, retries=Retries(attempts=20))


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("policies")
    (folder / "tiers.yaml").write_text(TIERS)
    return [str(folder)]


@pytest.fixture(scope="module")
def target(ray_cluster: Any, config: dict[str, Any], policies: list[str]) -> Iterator[str]:
    """Where the ingress listens: a cascade of two deployments, with deploy/ray's own options."""
    from ray import serve
    from ray.serve.config import gRPCOptions

    from guard_service.on_ray.app import build

    with (
        socket.create_server(("127.0.0.1", 0)) as free,
        socket.create_server(("127.0.0.1", 0)) as http,
    ):
        port, http_port = free.getsockname()[1], http.getsockname()[1]
    options = {**config["grpc_options"], "port": port}
    serve.start(http_options={"port": http_port}, grpc_options=gRPCOptions(**options))
    one = {"model": "fake", "threads": 1, "policies": policies}
    serve.run(build({**one, "second": one}), name="guard", route_prefix="/guard")
    yield f"127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def client(target: str) -> Iterator[GuardClient]:
    with GuardClient(target, PATIENT) as made:
        yield made


@pytest.fixture(scope="module")
def plain(policies: list[str]) -> Iterator[grpc.Channel]:
    """The same guard without Ray."""
    folders = tuple(map(Path, policies))
    with (
        local_server(Settings(model="fake", policies=folders)) as target,
        grpc.insecure_channel(target) as channel,
    ):
        yield channel


@pytest.fixture(scope="module")
def by_ray(target: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target) as channel:
        yield channel


def asked(text: str = "hello", **fields: Any) -> guard_pb2.ClassifyRequest:
    request = guard_pb2.ClassifyRequest(**fields)
    request.conversation.messages.add(role=guard_pb2.ROLE_USER).parts.add(text=text)
    return request


def test_verdicts_are_those_of_the_service(client: GuardClient) -> None:
    harmless, harmful = client.classify_batch(["hello", "a fake-bomb"])
    assert harmless.allowed and harmful.blocked  # type: ignore[union-attr]
    assert client.classify("a fake-bomb").blocked
    assert {one.policy.name for one in client.list_policies().policies} >= {"default", "tiers"}
    assert client.health()


def test_second_guard_of_a_cascade_is_a_deployment_of_its_own(client: GuardClient) -> None:
    assert [one.model.tier for one in client.info().models] == ["first", "second"]
    verdict = client.classify("fake-abuse", policy="tiers")
    assert verdict.judged and verdict.model.tier == "second" and verdict.blocked


def test_stream_is_judged_as_it_grows(client: GuardClient) -> None:
    pieces: list[Piece | str] = [Piece("all is ", check=True), "well, and a fake-bomb"]
    seen = list(client.classify_stream("hi", pieces))
    assert [one.final for one in seen] == [False, True]
    assert [one.outcome.allowed for one in seen] == [True, False]


WRONG = {
    "policy": asked(policy="nobody"),
    "language": asked(language="no language"),
    "empty": guard_pb2.ClassifyRequest(),
    "too long": asked("x" * 600_000),
    "image": guard_pb2.ClassifyRequest(
        conversation=guard_pb2.Conversation(
            messages=[
                guard_pb2.Message(
                    role=guard_pb2.ROLE_USER,
                    parts=[guard_pb2.Part(image=guard_pb2.Image(data=b"x"))],
                )
            ]
        ),
        policy="strict",
    ),
}


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG)
def test_errors_are_those_of_the_service_to_the_last_detail(
    plain: grpc.Channel, by_ray: grpc.Channel, request_: guard_pb2.ClassifyRequest
) -> None:
    assert _end(by_ray, request_) == _end(plain, request_)


def _end(channel: grpc.Channel, request: guard_pb2.ClassifyRequest) -> object:
    """Code, text and details of a call with a request id of its own; what it gave, if it gave."""
    stub = guard_pb2_grpc.GuardServiceStub(channel)
    metadata = (("x-request-id", "mine-1"),)
    try:
        reply, call = stub.Classify.with_call(request, timeout=LIMIT_S, metadata=metadata)
    except grpc.RpcError as failed:
        status = rpc_status.from_call(failed)
        return failed.code(), failed.details(), status and list(status.details), _id(failed)
    return reply.verdict.action, list(reply.verdict.coverage.parts), _id(call)


def _id(call: Any) -> object:
    return dict(call.trailing_metadata() or ()).get("x-request-id")


def test_message_that_is_too_large_is_the_callers_mistake(client: GuardClient) -> None:
    with pytest.raises(InvalidRequest):
        client.classify("x" * (5 * 2**20))


def test_stream_that_is_refused_has_no_verdict(client: GuardClient) -> None:
    """With the service's code and text, unless gRPC's asyncio client lost them: a write that fails
    as the call ends replaces its status (grpc/grpc#36066)."""
    with pytest.raises(GuardError) as told:
        list(client.classify_stream("hi", ["a"], policy="nobody"))
    if told.value.code is not grpc.StatusCode.INTERNAL:
        assert isinstance(told.value, UnknownPolicy)
        assert "no policy of that name" in str(told.value)


def test_health_is_answered_and_cannot_be_watched(by_ray: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(by_ray)
    with pytest.raises(grpc.RpcError) as unknown:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=LIMIT_S)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as unwatched:
        next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT_S))
    assert unwatched.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_clients_that_watch_health_are_served(target: str) -> None:
    with GuardClient(f"ipv4:{target}", PATIENT) as client:
        assert client.classify("hello").allowed


def test_none_is_lost_while_replicas_come_and_go(
    target: str, policies: list[str], ray_cluster: Any
) -> None:
    from ray import serve

    from guard_service.on_ray.replica import Guard

    ends: Counter[str] = Counter()
    over = threading.Event()

    def ask() -> None:
        with GuardClient(target, PATIENT) as client:
            while not over.is_set():
                try:
                    ends[client.classify("hello", no_cache=True).action.value] += 1
                except GuardError as error:
                    ends[error.reason] += 1

    def deploy(count: int) -> None:
        made = serve.deployment(Guard, name="guard", num_replicas=count, max_ongoing_requests=64)
        app = made.bind({"model": "fake", "threads": 1, "policies": policies})
        serve.run(app, name="guard", route_prefix="/guard")

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for one in callers:
        one.start()
    try:
        for count in (3, 1):
            deploy(count)
            goal = ends["allow"] + 50
            wait_for(lambda goal=goal: ends["allow"] >= goal)  # type: ignore[misc]
    finally:
        over.set()
        for one in callers:
            one.join()
    assert set(ends) == {"allow"}


def wait_for(met: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(int(LIMIT_S / 0.05)):
        if met():
            return
        waited.wait(0.05)
    raise AssertionError("it never came to be")


def test_mistakes_in_settings_are_told_when_the_application_is_built(ray_cluster: Any) -> None:
    from guard_service.on_ray.app import build

    with pytest.raises(ConfigError, match="modle") as told:
        build({"modle": "fake", "threads": "many"})
    assert len(told.value.problems) == 2
    with pytest.raises(ConfigError, match="unknown setting portt"):
        build({"model": "fake", "second": {"portt": 1}})


def test_replica_has_the_threads_that_ray_gave_it(tmp_path: Path) -> None:
    from guard_service.on_ray.settings import settings_of

    nothing: dict[str, str] = {}
    assert settings_of({}, 3.0, nothing).threads == 3
    assert settings_of({"threads": 1}, 3.0, nothing).threads == 1
    assert settings_of({}, 3.0, {"GUARD_THREADS": "2"}).threads == 2
    assert settings_of({}, 0.5, nothing).threads == 0
    file = tmp_path / "guard.yaml"
    file.write_text("threads: 5\nmodel: fake\n")
    assert settings_of({"config": str(file)}, 3.0, nothing).threads == 5
    assert settings_of({}, 3.0, {"GUARD_CONFIG": str(file)}).model == "fake"
