"""deploy/SECURITY.md: what it says holds a boundary is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "deploy" / "SECURITY.md").read_text(encoding="utf-8")


def test_every_boundary_names_a_test_that_exists() -> None:
    rows = re.findall(r"^\| .* \|$", TEXT.partition("## What attacks get")[0], re.MULTILINE)[2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test: {row}"
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            found = (ast.FunctionDef, ast.AsyncFunctionDef)
            assert any(isinstance(one, found) and one.name == name for one in tree.body), (
                f"{file} has no {name}"
            )


def test_every_boundary_that_the_page_must_have_is_there() -> None:
    for boundary in (
        "client to service",
        "middleware to service",
        "upstream's reply",
        "images",
        "addresses of images",
        "model folders",
        "policy files",
        "auth file",
        "metrics port",
        "logs, metrics, settings",
        "audit log",
        "cluster network",
        "supply chain",
    ):
        assert f"\n| {boundary} |" in TEXT
