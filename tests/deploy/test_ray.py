"""deploy/ray: names lead to code, settings exist, pods are valid, two copies of a file agree.

What Ray's own schema says of the Serve files is in tests/on_ray, where Ray is installed.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from guard_service.config import FIELDS, Settings
from tests.deploy.manifests import ROOT, Object

FOLDER = ROOT / "deploy" / "ray"
SERVE_FILES = sorted(FOLDER.glob("[!r]*.yaml"))
RESOURCES: list[Object] = list(yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text()))
# Of KubeRay's RayService and of what it is made of: those that are used here.
FIELDS_OF_A_CLUSTER = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "workerGroupSpecs",
}
FIELDS_OF_A_GROUP = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
}


def of_kind(kind: str) -> Object:
    (found,) = (one for one in RESOURCES if one["kind"] == kind)
    return found


def defined_in(module: str) -> dict[str, ast.AST]:
    """The functions and constants of a module, without importing what it imports."""
    found = find_spec(module)
    assert found is not None and found.origin is not None, module
    names: dict[str, ast.AST] = {}
    for node in ast.parse(Path(found.origin).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert isinstance(node.value, ast.Tuple)
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                names[ast.unparse(target)] = value
    return names


@pytest.fixture(params=SERVE_FILES, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(request.param.read_text())
    return found


def test_names_lead_to_code(config: dict[str, Any]) -> None:
    for path in config["grpc_options"]["grpc_servicer_functions"]:
        module, _, name = path.rpartition(".")
        assert name in defined_in(module)
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    names = defined_in(module)
    assert name in names
    deployments = {one["name"] for one in application["deployments"]}
    own = {ast.literal_eval(names[one]) for one in ("GUARD", "SECOND")}
    assert deployments == (own if "second" in application["args"] else {"guard"})


def test_arguments_are_settings(config: dict[str, Any]) -> None:
    arguments = dict(config["applications"][0]["args"])
    second = arguments.pop("second", {})
    assert {*arguments, *second} <= {*FIELDS, "config"}
    assert second.get("policies") == (arguments.get("policies") if second else None)


def test_the_guard_ends_calls_before_ray_does(config: dict[str, Any]) -> None:
    assert config["grpc_options"]["request_timeout_s"] > Settings().max_deadline_s


def test_kubernetes_serves_what_serve_yaml_says() -> None:
    said = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])
    assert said == yaml.safe_load((FOLDER / "serve.yaml").read_text())


def test_versions_are_those_that_are_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    (pin,) = re.findall(r"^ray==(.+)$", pins, re.MULTILINE)
    assert of_kind("RayService")["spec"]["rayClusterConfig"]["rayVersion"] == pin
    assert f"rayproject/ray:{pin}-py311" in (FOLDER / "Dockerfile").read_text()


def groups() -> list[Object]:
    cluster = of_kind("RayService")["spec"]["rayClusterConfig"]
    assert set(cluster) <= FIELDS_OF_A_CLUSTER
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_pods_service_and_policy_are_valid() -> None:
    for group in groups():
        assert set(group) <= FIELDS_OF_A_GROUP
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {"name": "pod", **pod["metadata"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)
    for kind in ("Service", "NetworkPolicy"):
        kubernetes_validate.validate(of_kind(kind), "1.30", strict=True)


def test_pods_hold_the_replicas_and_are_found_by_clients_alone() -> None:
    head, workers = groups()
    options = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])
    (replica,) = options["applications"][0]["deployments"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    container = workers["template"]["spec"]["containers"][0]
    fit = int(container["resources"]["limits"]["cpu"]) // replica["ray_actor_options"]["num_cpus"]
    assert workers["minReplicas"] * fit >= replica["autoscaling_config"]["min_replicas"]
    assert workers["maxReplicas"] * fit >= replica["autoscaling_config"]["max_replicas"]
    port = options["grpc_options"]["port"]
    assert {"name": "guard", "containerPort": port} in container["ports"]
    assert of_kind("Service")["spec"]["ports"][0]["port"] == port
    label = workers["template"]["metadata"]["labels"]
    assert label.items() <= of_kind("Service")["spec"]["selector"].items()
    policy = of_kind("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == label
    by_anyone = [rule for rule in policy["ingress"] if "ports" not in rule]
    assert [rule["from"] for rule in by_anyone] == [[{"podSelector": {"matchLabels": label}}]]


def test_image_is_made_as_hadolint_wants_it() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint")
    done = subprocess.run(
        [hadolint, "--ignore", "DL3006", str(FOLDER / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
