"""Verdicts a second through Ray Serve with one and with several replicas of this machine.

    python -m tests.on_ray.throughput --replicas 1 2 --rounds 3

All take turns, with the plain guard-service among them. Callers are in a process of their own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guard_middleware import GuardClient, Retries, Terms
from guard_service.cli.apart import guard_apart
from tests.on_ray.conftest import ENVIRONMENT, ROOT, cluster_of

PORT, HTTP_PORT = 50951, 50952
CALLERS = 16
PATIENT = Terms(timeout_s=120.0, retries=Retries(attempts=50))


def load(target: str, seconds: float, salt: str) -> float:
    """Verdicts a second of so many callers, no text twice."""
    over, counts = threading.Event(), [0] * CALLERS

    def ask(own: int) -> None:
        with GuardClient(target, PATIENT) as client:
            while not over.is_set():
                client.classify(f"{salt} {own} {counts[own]} how do I bake bread", no_cache=True)
                counts[own] += 1

    callers = [threading.Thread(target=ask, args=(own,)) for own in range(CALLERS)]
    began = time.monotonic()
    for one in callers:
        one.start()
    over.wait(seconds)
    over.set()
    for one in callers:
        one.join()
    return sum(counts) / (time.monotonic() - began)


def load_apart(target: str, seconds: float, salt: str) -> float:
    """The same from another process."""
    command = [sys.executable, "-m", "tests.on_ray.throughput", "--load", target]
    command += ["--seconds", str(seconds), "--salt", salt]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


@contextmanager
def served() -> Iterator[Any]:
    """Ray Serve's proxy on `PORT`; yields what deploys so many replicas behind it."""
    from ray import serve
    from ray.serve.config import gRPCOptions

    from guard_service.on_ray.replica import Guard

    functions = ["guard_api.v1.guard_pb2_grpc.add_GuardServiceServicer_to_server"]
    options = gRPCOptions(port=PORT, grpc_servicer_functions=functions)
    with cluster_of(cpus=8):
        serve.start(http_options={"port": HTTP_PORT}, grpc_options=options)

        def deploy(count: int) -> None:
            made = serve.deployment(
                Guard, name="guard", num_replicas=count, max_ongoing_requests=64
            )
            serve.run(made.bind({"threads": 1, "log_level": "error"}), route_prefix="/guard")

        yield deploy
        serve.shutdown()


def main() -> int:
    """Measure and print; or be the callers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--load")
    parser.add_argument("--salt", default="")
    arguments = parser.parse_args()
    if arguments.load:
        print(load(arguments.load, arguments.seconds, arguments.salt))
        return 0
    os.environ.update(ENVIRONMENT)
    rates: dict[str, list[float]] = {}
    with guard_apart("starter", ()) as plain, served() as deploy:
        for at in range(arguments.rounds):
            for count in (0, *arguments.replicas):
                if count:
                    deploy(count)
                target = f"127.0.0.1:{PORT}" if count else plain
                name = f"Ray Serve, replicas: {count}" if count else "guard-service alone"
                load_apart(target, 2.0, f"warm {at}")
                rate = load_apart(target, arguments.seconds, f"{at} {count}")
                rates.setdefault(name, []).append(rate)
                print(f"{name}: {rate:.1f} a second", flush=True)
    for name, found in rates.items():
        each = ", ".join(f"{rate:.0f}" for rate in found)
        print(f"{name:<24} {statistics.median(found):6.1f} a second (of {each})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
