"""The house in order: what is imported is declared and pinned, links lead somewhere, sizes hold."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OURS = {
    "guard_api": "proto",
    "guard_middleware": "middleware",
    "guard_policies": "policies",
    "guard_quantization": "quantization",
    "guard_service": ".",
    "tests": ".",
}
MAY_USE = {
    "guard_service": ("fetch", "ray", "tracing", "vision"),
    "guard_middleware": ("sidecar", "tracing"),
    "guard_quantization": ("quantization",),
    "tests": ("dev", "quantization"),
}
MOST_LINES = {"file": 600, "function": 60}
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("middleware", "policies", "proto")),
]


def sources(package: str) -> Iterator[Path]:
    """The modules of a package that people write."""
    folder = ROOT / OURS[package] / package
    yield from (path for path in folder.rglob("*.py") if not path.stem.endswith(("_pb2", "_grpc")))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def declared(package: str) -> set[str]:
    """Distributions that a package may import from."""
    lists = (PROJECT["dependencies"], *(EXTRAS[extra] for extra in MAY_USE.get(package, ())))
    return {canonicalize_name(Requirement(line).name) for lines in lists for line in lines}


DISTRIBUTIONS = packages_distributions()


def provider(module: str) -> set[str]:
    """Distributions that `module` may come from; empty when it is not installed."""
    if module.startswith("google.rpc"):
        return {"googleapis-common-protos"}
    if module.startswith("google.protobuf"):
        return {"protobuf"}
    found = DISTRIBUTIONS.get(module.partition(".")[0], [])
    return {canonicalize_name(name) for name in found}


@pytest.mark.parametrize("package", OURS)
def test_every_import_is_of_a_declared_dependency(package: str) -> None:
    known = {*sys.stdlib_module_names, *OURS, "_typeshed"}
    allowed = declared(package)
    undeclared = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(package)
        for module in imported(path)
        if module.partition(".")[0] not in known
        and (come_from := provider(module))
        and not come_from & allowed
    }
    assert not undeclared, "\n".join(sorted(undeclared))


def test_every_dependency_is_pinned_at_a_version_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): pin for name, pin in pins.items()}
    wanted = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(
            requirement
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_links_of_documents_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    # The starter guard's card comes with the guard.
    starter = (ROOT / "guard_service/models/starter").exists()
    assert not [link for link in missing if starter or "models/starter" not in link]


def test_verbs_that_documents_name_are_in_the_makefile() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(path.read_text() for path in (*DOCUMENTS, ROOT / ".ci" / "run"))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert named and named <= verbs


@pytest.mark.parametrize("package", OURS)
def test_files_and_functions_stay_short(package: str) -> None:
    too_long = []
    for path in sources(package):
        text = path.read_text()
        spans = [("file", path.name, len(text.splitlines()))]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1  # without the signature
                spans.append(("function", node.name, lines))
        too_long += [
            f"{path.relative_to(ROOT)}: {kind} {name} has {lines} lines"
            for kind, name, lines in spans
            if lines > MOST_LINES[kind]
        ]
    assert not too_long, "\n".join(too_long)
