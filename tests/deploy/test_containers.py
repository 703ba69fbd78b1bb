"""The container file: linted, and every promise that the code must keep with it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.sidecar import Places
from guard_service.config import Settings
from tests.deploy.manifests import ROOT

DOCKERFILE = ROOT / "deploy" / "containers" / "Dockerfile"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGES = ("service", "sidecar", "vision")


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction's name and the rest, continued lines put together."""
    plain = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(plain).replace("\\\n", " ")
    lines = (line.strip() for line in joined.splitlines())
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)
    ]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions, its FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions(DOCKERFILE.read_text()):
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
            found[stage] = []
        if found:
            found[stage].append((name, rest))
    return found


def image(target: str) -> list[tuple[str, str]]:
    """What an image is made by: its stage, behind the stages that it builds on."""
    made = stages()[target]
    base = made[0][1].split()[0]
    return [*(image(base) if base in stages() else ()), *made]


def last(target: str, name: str) -> str:
    return [rest for instruction, rest in image(target) if instruction == name][-1]


def environment(target: str) -> dict[str, str]:
    words = [w for name, rest in image(target) if name == "ENV" for w in shlex.split(rest)]
    return dict(word.split("=", 1) for word in words)


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    said = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_bases_are_pinned() -> None:
    (default,) = (rest for name, rest in instructions(DOCKERFILE.read_text()) if name == "ARG")
    name, _, pinned = default.partition("=")
    _, _, tag = pinned.rpartition(":")
    assert tag.count(".") == 2 and "slim" in tag, "a whole version"
    for stage in stages().values():
        assert stage[0][1].split()[0] in {f"${{{name}}}", *stages()}


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_runs_as_a_user_with_a_number(target: str) -> None:
    assert last(target, "USER") == "65532:65532"


@pytest.mark.parametrize("target", IMAGES)
def test_nothing_is_run_through_a_shell(target: str) -> None:
    for name, rest in image(target):
        if name in ("ENTRYPOINT", "CMD"):
            json.loads(rest)
        if name == "HEALTHCHECK":
            json.loads(rest.partition(" CMD ")[2])


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_has_no_build_tools_and_takes_only_the_environment_from_other_stages(
    target: str,
) -> None:
    runs = [rest for name, rest in image(target) if name == "RUN"]
    assert len(runs) == 1 and runs[0].startswith("pip uninstall --yes pip setuptools wheel")
    copies = [rest for name, rest in image(target) if name in ("COPY", "ADD")]
    assert copies == [f"--from={target}-packages /opt/guard /opt/guard"]


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_starts_a_command_of_ours_at_the_ports_that_it_names(target: str) -> None:
    command, *arguments = json.loads(last(target, "ENTRYPOINT"))
    assert command in PYPROJECT["project"]["scripts"]
    exposed = {int(port) for port in last(target, "EXPOSE").split()}
    check = json.loads(last(target, "HEALTHCHECK").partition(" CMD ")[2])[-1]
    if target == "sidecar":
        listens = dict(zip(arguments[::2], arguments[1::2], strict=True))
        ports = {int(place.rpartition(":")[2]) for place in listens.values()}
        defaults = (Places("http://x").listen, Places("http://x").admin)
        assert ports == {int(place.rpartition(":")[2]) for place in defaults} == exposed
        assert f"127.0.0.1:{listens['--admin'].rpartition(':')[2]}/livez" in check
    else:
        assert exposed == {Settings().port, Settings().metrics_port}
        assert environment(target)["GUARD_HOST"] == "0.0.0.0"
        assert f"127.0.0.1:{Settings().metrics_port}/readyz" in check


def test_extras_that_are_installed_are_declared() -> None:
    text = DOCKERFILE.read_text()
    named = {e for part in text.split("*.whl)[")[1:] for e in part.partition("]")[0].split(",")}
    assert named and named <= PYPROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        ("service", {"tracing"}),
        ("sidecar", {"sidecar", "tracing"}),
        ("vision", {"vision", "fetch", "tracing"}),  # it sees images, those at addresses too
    ],
)
def test_an_image_has_what_its_settings_can_ask_for(target: str, needed: set[str]) -> None:
    (installed,) = (rest for name, rest in stages()[f"{target}-packages"] if name == "RUN")
    extras = installed.partition("*.whl)[")[2].partition("]")[0].split(",")
    assert needed <= set(extras)


def test_the_rehearsal_installs_what_the_images_have() -> None:
    rehearsed = (DOCKERFILE.with_name("rehearse.sh")).read_text()
    for target in IMAGES:
        (installed,) = (rest for name, rest in stages()[f"{target}-packages"] if name == "RUN")
        extras = installed.partition("*.whl)")[2].strip('"')
        command = json.loads(last(target, "ENTRYPOINT"))[0]
        assert f"{target}) extras='{extras}' command={command} ;;" in rehearsed


def test_the_build_sees_what_the_wheel_is_made_of_and_little_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing goes in that is not named"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    project = PYPROJECT["project"]
    needed = {path.partition("/")[0] for path in wheel} | {"pyproject.toml", "constraints.txt"}
    assert let_in == needed | {project["readme"], *project["license-files"]}
