"""guardctl policy lint, show and test."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from guard_service.cli.app import app

RUN = CliRunner()
BROKEN = "version: 1\nname: mine\nsurprise: 3\n"


def test_lint_names_file_line_and_column_of_every_mistake(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(BROKEN)
    second.write_text("name: [\n")
    result = RUN.invoke(app, ["policy", "lint", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{first}:3:1: " in result.stdout
    assert f"{second}:" in result.stdout


def test_lint_of_what_is_fine_names_the_policies() -> None:
    builtin = Path(__file__).parents[2] / "policies/guard_policies/builtin"
    result = RUN.invoke(app, ["policy", "lint", str(builtin)])
    assert result.exit_code == 0
    assert result.stdout.startswith("ok  default 1  sha256:")


def test_lint_of_nothing_is_no_success(tmp_path: Path) -> None:
    assert RUN.invoke(app, ["policy", "lint", str(tmp_path)]).exit_code == 2


def test_show_tells_every_rule_of_both_directions() -> None:
    shown = RUN.invoke(app, ["policy", "show", "default"]).stdout
    assert shown.count("Violent Crimes") == 4  # S1 and "Non-Violent Crimes", twice
    assert "block  at 0.5" in shown
    told = json.loads(RUN.invoke(app, ["policy", "show", "default", "--json"]).stdout)
    assert told["name"] == "default" and set(told["rules"]) == {"prompt", "response"}


def test_show_of_an_unknown_name_lists_the_known_ones() -> None:
    result = RUN.invoke(app, ["policy", "show", "defualt"])
    assert result.exit_code == 2
    assert "built in: default, permissive, strict" in result.stderr


CASES = """policy: default
cases:
  - name: clearly unsafe
    direction: prompt
    unsafe: 0.9
    scores: {S1: 0.9}
    expect: {action: ACTION}
"""


def test_cases_that_pass_are_counted(tmp_path: Path) -> None:
    table = tmp_path / "default.yaml"
    table.write_text(CASES.replace("ACTION", "block"))
    result = RUN.invoke(app, ["policy", "test", str(table)])
    assert (result.exit_code, result.stdout) == (0, "1 of 1 cases pass\n")


def test_case_that_fails_is_named_with_its_place(tmp_path: Path) -> None:
    table = tmp_path / "default.yaml"
    table.write_text(CASES.replace("ACTION", "allow"))
    result = RUN.invoke(app, ["policy", "test", str(table)])
    assert result.exit_code == 1
    assert f"{table}:3:" in result.stdout
    assert "action is block, expected allow" in result.stdout
    assert "0 of 1 cases pass" in result.stdout


def test_no_cases_is_no_success(tmp_path: Path) -> None:
    assert RUN.invoke(app, ["policy", "test", str(tmp_path)]).exit_code == 2
    assert RUN.invoke(app, ["policy", "test", str(tmp_path / "none")]).exit_code == 2
