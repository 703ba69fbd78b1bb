"""The manifests as kubectl renders them, and the questions that tests ask of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
GUARDS = ("starter", "cpu", "gpu", "mtls-guard", "auth-guard")
BACKENDS = ("vllm", "ollama", "tgi", "mtls-vllm")
GATEWAYS = ("envoy",)
SCENARIOS = (
    *(f"scenarios/{name}" for name in (*GUARDS, *BACKENDS, *GATEWAYS)),
    "models/llama-guard-3-1b",
    "models/llama-guard-3-11b-vision",
)
WORKLOADS = ("Deployment", "Job")
Object = dict[str, Any]


@cache
def rendered(scenario: str) -> tuple[Object, ...]:
    """Every object of a scenario. Skips where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, which renders kustomizations")
    made = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / scenario)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert not made.stderr, made.stderr
    return tuple(yaml.load_all(made.stdout, yaml.CSafeLoader))


def of_kind(scenario: str, kind: str) -> list[Object]:
    return [one for one in rendered(scenario) if one["kind"] == kind]


def named(scenario: str, kind: str, name: str) -> Object:
    (found,) = (one for one in of_kind(scenario, kind) if one["metadata"]["name"] == name)
    return found


def pod_templates(scenario: str) -> list[Object]:
    """The pod templates of Deployments and Jobs."""
    return [one["spec"]["template"] for one in rendered(scenario) if one["kind"] in WORKLOADS]


def containers(pod: Object) -> Iterator[Object]:
    """All containers of a pod's spec, those of its start first."""
    yield from pod.get("initContainers", ())
    yield from pod["containers"]


def environment(container: Object) -> dict[str, Any]:
    """Names to values; None for a value that the cluster fills in."""
    return {one["name"]: one.get("value") for one in container.get("env", ())}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, without expressions here, takes an object with these labels."""
    assert set(selector) <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
