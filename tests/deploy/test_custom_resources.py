"""Objects of kinds that Kubernetes itself has not, by the models that npm packages carry."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import SCENARIOS, Object, rendered
from tests.deploy.test_manifests import CUSTOM

FOLDER = Path(__file__).with_name("crds")


def checked(resources: list[Object]) -> tuple[int, str]:
    node = shutil.which("node")
    if node is None or not (FOLDER / "node_modules").is_dir():
        pytest.skip("needs node, and: npm install --prefix tests/deploy/crds")
    done = subprocess.run(
        [node, str(FOLDER / "check.mjs")],
        input=json.dumps(resources),
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def custom_resources() -> list[Object]:
    """Each once, whatever the scenarios."""
    found = {
        json.dumps(one, sort_keys=True): one
        for scenario in SCENARIOS
        for one in rendered(scenario)
        if one["kind"] in CUSTOM
    }
    return list(found.values())


def test_every_custom_resource_is_valid_and_has_no_unknown_field() -> None:
    resources = custom_resources()
    assert {one["kind"] for one in resources} == CUSTOM
    assert checked(resources) == (0, f"{len(resources)} valid\n")


def test_the_check_finds_wrong_values_and_unknown_fields() -> None:
    resources = copy.deepcopy(custom_resources())
    for one in resources:
        if one["kind"] == "ServiceMonitor":
            one["spec"]["endpoints"][0]["interval"] = "often"
        if one["kind"] == "GRPCRoute":
            one["spec"]["rules"][0]["backendReffs"] = []
    code, said = checked(resources)
    assert code == 1 and "/spec/endpoints/0/interval" in said and "backendReffs" in said
