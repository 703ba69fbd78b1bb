"""A Ray cluster on this machine; only where Ray is installed (`make test-ray`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / one) for one in (".", "middleware", "policies", "proto"))
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # the processes of one test, on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own is 15: on a busy machine that is to stand still
    "RAY_prestart_worker_first_driver": "0",  # not a process for each CPU
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a machine with other things to do
}


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[None]:
    """What Ray's processes are to find in theirs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@contextmanager
def cluster_of(cpus: int) -> Iterator[Any]:
    """Ray with one node of so many CPUs: they are counted, there need not be so many."""
    import ray

    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": PATHS}},
    )
    try:
        yield ray
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(ray_environment: None) -> Iterator[Any]:
    """Ray with one node."""
    pytest.importorskip("ray", reason="needs Ray: make test-ray")
    with cluster_of(cpus=8) as ray:
        yield ray


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """deploy/ray/serve.yaml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    return found
