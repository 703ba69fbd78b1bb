"""The schema for editors agrees with the loader."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from guard_policies import syntax
from guard_policies.loader import PolicyError, parse_policy
from guard_policies.schema import MIN_THRESHOLD

PACKAGE = resources.files("guard_policies")
SCHEMA: dict[str, Any] = json.loads((PACKAGE / "policy.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
CASES = Path(__file__).parents[2] / "policies" / "cases" / "policies"
FILES = [
    *(one for one in (PACKAGE / "builtin").iterdir() if one.name.endswith(".yaml")),
    *CASES.glob("*.yaml"),
]
HEAD = "name: a\nversion: '1'\n"


class Editor(yaml.SafeLoader):
    """YAML 1.2 as editors read it: only true and false are booleans, dates are text."""


Editor.yaml_implicit_resolvers = {
    first: [(tag, how) for tag, how in some if not tag.endswith((":bool", ":timestamp"))]
    for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def as_an_editor_reads(text: str) -> Any:
    return yaml.load(text, Editor)


def keys_of(definition: str) -> set[str]:
    node = SCHEMA["$defs"][definition]
    table = node if "properties" in node else node["anyOf"][1]
    return set(table["properties"])


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", FILES, ids=lambda one: one.name)
def test_policies_of_this_repository_are_valid(file: Any) -> None:
    assert list(VALIDATOR.iter_errors(as_an_editor_reads(file.read_text()))) == []


def test_schema_and_loader_know_the_same_keys_and_words() -> None:
    assert set(SCHEMA["properties"]) == set(syntax.POLICY_KEYS)
    assert keys_of("settings") == set(syntax.SETTING_KEYS)
    assert keys_of("category") == set(syntax.CATEGORY_KEYS)
    assert keys_of("language") == set(syntax.LANGUAGE_KEYS)
    assert keys_of("language_category") == set(syntax.LANGUAGE_CATEGORY_KEYS)
    assert keys_of("language_settings") == set(syntax.RULE_KEYS)
    assert keys_of("stream") == set(syntax.STREAM_KEYS)
    assert keys_of("cascade") == set(syntax.CASCADE_KEYS)
    assert tuple(SCHEMA["$defs"]["action"]["enum"]) == syntax.ACTIONS
    assert SCHEMA["$defs"]["threshold"]["minimum"] == MIN_THRESHOLD
    assert SCHEMA["properties"]["engine"]["pattern"] == f"^{syntax.ENGINE.pattern}$"
    second = SCHEMA["$defs"]["cascade"]["properties"]["second"]
    assert second["pattern"] == f"^{syntax.ENGINE.pattern}$"
    timeout_s = SCHEMA["$defs"]["cascade"]["properties"]["timeout_s"]
    assert (timeout_s["minimum"], timeout_s["maximum"]) == syntax.CASCADE_TIMEOUT_S
    assert SCHEMA["$defs"]["name"]["pattern"] == f"^{syntax.NAME.pattern}$"


@pytest.mark.parametrize(
    "lines",
    [
        "treshold: 0.4",
        "mode: dark",
        "action: maybe",
        "threshold: 0",
        "threshold: 1.5",
        "threshold: '0.5'",
        "on_unavailable: error",
        "prompt: {mode: shadow}",
        "categories: {S0: off}",
        "categories: {S100: off}",
        "categories: {S15: flag}",
        "categories: {S15: {name: N}}",
        "categories: {S1: }",
        "categories: {S1: {prompt: {name: N}}}",
        "languages: {default: {}}",
        "languages: {de: {action: off}}",
        "languages: {de: {prompt: off}}",
        "languages: {de: {categories: {S5: off}}}",
        "languages: {de: {on_unscannable: flag}}",
        "stream: {check_every_chars: 0}",
        "stream: {check_every_chars: 1.5}",
        "stream: {first_check_chars: 0}",
        "stream: {sentence_ends: often}",
        "stream: {hold_back_chars: -1}",
        "cascade: {band: 0.5}",
        "cascade: {band: [0.5]}",
        "cascade: {band: [0, 1.1]}",
        "cascade: {categories: {S4: 2}}",
        "cascade: {images: false}",
        "cascade: {images: false, categories: {}}",
        "cascade: {when_unable: allow}",
        "cascade: {timeout_s: 0}",
        "cascade: {second: a b}",
        "refusal: ''",
        "refusal: {de: []}",
        "engine: a b",
        "name: b c",
    ],
)
def test_both_refuse_the_same(lines: str) -> None:
    text = HEAD.removeprefix("name: a\n" if lines.startswith("name") else "") + lines
    assert not VALIDATOR.is_valid(as_an_editor_reads(text))
    with pytest.raises(PolicyError):
        parse_policy(text)
