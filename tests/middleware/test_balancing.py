"""Calls over several guards: spread, none lost while one dies, drains, hangs, and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from guard_middleware import (
    AsyncGuardClient,
    GuardClient,
    GuardError,
    InvalidRequest,
    Outcome,
    Retries,
    Terms,
    Unavailable,
    channel,
)
from guard_middleware.breaker import Breaking
from guard_middleware.guards import RemoteGuard
from guard_middleware.settings import Settings
from guard_middleware.turns import read_turns
from tests.middleware.fake_service import Refusal, verdict
from tests.middleware.replicas import (
    LIMIT_S,
    NOT_SERVING,
    SERVING,
    Replica,
    replicas,
    target_of,
    until,
)

ROOT = Path(__file__).parents[2]
PATIENT = Terms(timeout_s=LIMIT_S, retries=Retries(attempts=50, longest_backoff_s=0.2))
CUT_SHORT = Terms(timeout_s=LIMIT_S, retries=Retries(attempts=50, try_timeout_s=0.2))


@pytest.fixture
def guards() -> Iterator[list[Replica]]:
    with replicas() as made:
        yield made


def all_asked(guards: list[Replica], client: GuardClient) -> None:
    """Until each of them has got a call."""
    before = [one.asked for one in guards]
    until(
        lambda: all(one.asked > old for one, old in zip(guards, before, strict=True)),
        lambda: client.classify("a"),
    )


class Callers:
    """Threads that ask without pause for as long as the block lasts."""

    def __init__(self, client: GuardClient, count: int = 4) -> None:
        self.answered = 0
        self.lost: Counter[str] = Counter()
        self._client = client
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def __enter__(self) -> Callers:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for one in self._threads:
            one.join()

    def go_on(self, calls: int = 60) -> None:
        """Wait until so many more have been answered."""
        goal = self.answered + calls
        until(lambda: self.answered >= goal or bool(self.lost), lambda: self._over.wait(0.01))

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                found = self._client.classify("a").allowed
            except GuardError as error:
                found = False
                self.lost[error.reason] += 1
            with self._lock:
                self.answered += found


def returned(one: Replica, callers: Callers) -> None:
    """Wait until it is asked again."""
    asked = one.asked
    until(lambda: one.asked > asked or bool(callers.lost), lambda: callers.go_on(1))


def test_calls_go_to_each_in_turn(guards: list[Replica]) -> None:
    with GuardClient(target_of(guards), PATIENT) as client:
        all_asked(guards, client)
        before = [one.asked for one in guards]
        for _ in range(30):
            client.classify("a")
        assert [one.asked - old for one, old in zip(guards, before, strict=True)] == [10, 10, 10]


async def test_calls_of_the_asyncio_client_go_to_each_in_turn(guards: list[Replica]) -> None:
    async with AsyncGuardClient(target_of(guards), PATIENT) as client:
        async with asyncio.timeout(LIMIT_S):
            while not all(one.asked for one in guards):
                await client.classify("a")
        before = [one.asked for one in guards]
        await asyncio.gather(*(client.classify("a") for _ in range(30)))
        assert [one.asked - old for one, old in zip(guards, before, strict=True)] == [10, 10, 10]


async def test_middleware_spreads_its_calls_too(guards: list[Replica]) -> None:
    guard = RemoteGuard(Settings(guard=target_of(guards)))
    try:
        async with asyncio.timeout(LIMIT_S):
            while not all(one.service.batches for one in guards):
                (outcome,) = await guard.judge([read_turns("a")])
                assert outcome.judged
        assert await guard.ready()
    finally:
        await guard.close()


def test_none_is_lost_while_one_dies_and_its_return_is_noticed(guards: list[Replica]) -> None:
    with GuardClient(target_of(guards), PATIENT) as client:
        all_asked(guards, client)
        with Callers(client) as callers:
            guards[0].die()
            callers.go_on()
            guards[0].start()
            returned(guards[0], callers)
        assert not callers.lost


def test_none_is_lost_while_all_die_one_after_another(guards: list[Replica]) -> None:
    with GuardClient(target_of(guards), PATIENT) as client:
        all_asked(guards, client)
        with Callers(client) as callers:
            for one in guards:
                one.die()
                callers.go_on(20)
                one.start()
                returned(one, callers)
        assert not callers.lost


def is_left_alone(one: Replica, client: GuardClient) -> bool:
    """Whether calls pass it by: of a dozen in a row each of three would get some."""
    asked = one.asked
    for _ in range(12):
        client.classify("a")
    return one.asked == asked


def test_one_that_drains_gets_no_new_calls_and_ends_those_it_has(guards: list[Replica]) -> None:
    first = guards[0]
    with GuardClient(target_of(guards), PATIENT) as client, ThreadPoolExecutor() as pool:
        all_asked(guards, client)
        first.hang()
        asked = first.asked
        calls: list[Future[Outcome]] = []
        while first.asked == asked:  # the last of them is held by it
            calls.append(pool.submit(client.classify, "a"))
            until(lambda: calls[-1].done() or first.asked > asked, lambda: wait(calls, 0.01))
        first.says(NOT_SERVING)
        until(lambda: is_left_alone(first, client), lambda: None)
        first.lets_answer.set()
        assert all(call.result(LIMIT_S).judged for call in calls)
        first.says(SERVING)
        all_asked(guards, client)


def test_none_is_lost_to_one_that_hangs_where_tries_are_cut_short(guards: list[Replica]) -> None:
    with GuardClient(target_of(guards), CUT_SHORT) as client:
        all_asked(guards, client)
        guards[0].hang()
        with Callers(client, count=8) as callers:
            callers.go_on()
        assert not callers.lost


def test_one_that_hangs_is_left_out_for_a_while_and_then_asked_again(
    guards: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "BALANCED", channel.balanced(watch_s=0.5, leave_out_s=1.0))
    with GuardClient(target_of(guards), CUT_SHORT) as client:
        all_asked(guards, client)
        guards[0].hang()
        with Callers(client, count=16) as callers:
            until(lambda: is_left_alone(guards[0], client), lambda: None)
            guards[0].lets_answer.set()
            returned(guards[0], callers)
        assert not callers.lost


def test_callers_mistakes_do_not_shut_the_way_for_others(
    guards: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though every call of some intervals ends with an error, others are judged at once."""
    monkeypatch.setattr(channel, "BALANCED", channel.balanced(watch_s=0.1, leave_out_s=60.0))
    wrong = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG")
    with GuardClient(target_of(guards), Terms(retries=Retries(attempts=1))) as client:
        for one in guards:
            one.service.answer = lambda request: wrong
        begun = time.monotonic()
        while time.monotonic() - begun < 1.0:
            with pytest.raises(InvalidRequest):
                client.classify("a")
        for one in guards:
            one.service.answer = lambda request: verdict()
        assert all(client.classify("a").allowed for _ in range(30))


def test_one_that_takes_connections_and_never_greets_costs_nothing() -> None:
    with replicas(2) as guards, socket.create_server(("127.0.0.1", 0)) as mute:
        target = f"ipv4:127.0.0.1:{mute.getsockname()[1]}," + target_of(guards)[len("ipv4:") :]
        with GuardClient(target, Terms(retries=Retries(attempts=1))) as client:
            all_asked(guards, client)
            assert all(client.classify("a").allowed for _ in range(20))


def test_when_none_serves_that_is_an_error_and_the_first_to_return_is_asked(
    guards: list[Replica],
) -> None:
    with GuardClient(target_of(guards), Terms(timeout_s=1.0)) as client:
        all_asked(guards, client)
        for one in guards:
            one.die()
        with pytest.raises(Unavailable):
            client.classify("a")
        with pytest.raises(Unavailable):
            client.health()
        guards[1].start()

        def answers() -> bool:
            try:
                return client.classify("a").allowed
            except Unavailable:
                return False

        until(answers, lambda: None)


def test_breaker_stays_shut_while_others_answer(guards: list[Replica]) -> None:
    terms = replace(CUT_SHORT, breaking=Breaking(failures=2, open_s=LIMIT_S))
    with GuardClient(target_of(guards), terms) as client:
        all_asked(guards, client)
        guards[0].hang()
        guards[1].die()
        assert all(client.classify("a").allowed for _ in range(6))


def test_process_that_is_stopped_costs_no_call_and_is_asked_again_when_it_goes_on() -> None:
    with replicas(2) as guards, guard_process() as (process, address):
        target = f"{target_of(guards)},{address}"
        with GuardClient(target, CUT_SHORT) as client:
            until(lambda: by_process(client), lambda: None)
            process.send_signal(signal.SIGSTOP)
            with Callers(client) as callers:
                callers.go_on(40)
            process.send_signal(signal.SIGCONT)
            assert not callers.lost
            until(lambda: by_process(client), lambda: None)


def by_process(client: GuardClient) -> bool:
    """Whether a call was answered by a real service, not by one of the test's own."""
    found = client.classify("a")
    return found.judged and found.model.digest != verdict().model.digest


def test_all_addresses_of_a_name_are_asked_and_new_ones_found() -> None:
    with names() as (resolver, addresses), ExitStack() as stack:
        guards = [Replica(f"127.0.0.{number}") for number in (1, 2, 3)]
        for one in guards[1:]:
            one.port = guards[0].port
        for one in guards:
            stack.callback(one.die)
            one.start()
        addresses[:] = ["127.0.0.1", "127.0.0.2"]
        target = f"dns://{resolver}/guard.test:{guards[0].port}"
        with GuardClient(target, PATIENT) as client:
            all_asked(guards[:2], client)
            addresses[:] = ["127.0.0.3", "127.0.0.2"]
            guards[0].die()  # gRPC looks names up anew when it loses a connection
            all_asked(guards[1:], client)
        assert guards[2].asked


@contextmanager
def names() -> Iterator[tuple[str, list[str]]]:
    """A name server on loopback: its address, and the IPv4 addresses that every name has."""
    addresses: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while (packet := server.recvfrom(512))[0] != b"end":
                question, asker = packet
                server.sendto(_answer(question, addresses), asker)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", addresses
        finally:
            server.sendto(b"end", server.getsockname())
            thread.join()


def _answer(question: bytes, addresses: list[str]) -> bytes:
    """The answer of RFC 1035 to a question of one name; nothing but addresses is known."""
    end = question.index(b"\0", 12) + 5  # behind name, type and class
    wants_addresses = question[end - 4 : end - 2] == b"\0\1"
    found = addresses if wants_addresses else []
    record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4"  # that name; A, IN, to be forgotten at once
    head = question[:2] + b"\x84\0\0\1" + len(found).to_bytes(2) + b"\0\0\0\0"
    return head + question[12:end] + b"".join(record + socket.inet_aton(one) for one in found)


@contextmanager
def guard_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """guard-service with the fake engine in a process of its own, and its address."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    flags = ("--model", "fake", "--no-metrics", "--port", "0", "--log-format", "json")
    with subprocess.Popen(
        [sys.executable, "-m", "guard_service", *flags],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            yield process, json.loads(process.stderr.readline())["address"]
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
