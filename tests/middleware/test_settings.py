"""Settings from keywords, flags and the environment; servers that construct without arguments."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from guard_middleware import GuardMiddleware
from guard_middleware.guards import LocalGuard, RemoteGuard
from guard_middleware.settings import FIELDS, Settings, SettingsError, from_environment, from_flags

NOTHING: Mapping[str, str] = {}


def test_environment_says_every_setting_and_keywords_go_first() -> None:
    environment = {
        "GUARDED_GUARD": "guard:50051",
        "GUARDED_GUARDED": "/v1, /own",
        "GUARDED_MAX_BODY_BYTES": "1000",
        "GUARDED_GUARD_TIMEOUT_S": "2.5",
        "GUARDED_MODE": "shadow",
        "OTHER": "x",
    }
    got = from_environment(environment, mode="enforce")
    assert got == Settings(
        guard="guard:50051", guarded=("/v1", "/own"), max_body_bytes=1000, guard_timeout_s=2.5
    )
    assert from_flags({"policy": "strict"}, environment).policy == "strict"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GUARDED_MODE": "off"}, "mode: 'off' is none of enforce, shadow"),
        ({"GUARDED_MAX_BODY_BYTES": "many"}, "max_body_bytes: is not a number"),
        ({"GUARDED_MAX_BODY_BYTES": "0"}, "max_body_bytes: 0 is not between 1"),
        ({"GUARDED_GUARD_TIMEOUT_S": "nan"}, "guard_timeout_s: nan is not between"),
        ({"GUARDED_UNKWNON": "pass"}, "unkwnon: there is no such setting"),
        ({"GUARDED_GUARDED": "v1"}, "guarded: paths begin with /"),
        ({"GUARDED_GUARD_TLS_KEY": "a"}, "one needs the other"),
        ({"GUARDED_GUARD_TOKEN_FILE": "a"}, "guard_token_file: needs guard"),
        ({"GUARDED_GUARD": "http://guard:50051"}, "guard: 'http://guard:50051' is no guard's addr"),
    ],
)
def test_mistakes_name_the_setting(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_environment(environment)


@pytest.mark.parametrize(
    "given",
    [{"max_body_bytes": "5"}, {"max_messages": True}, {"guarded": "/v1"}, {"policy": None}],
)
def test_keywords_of_another_type_are_mistakes(given: Mapping[str, object]) -> None:
    with pytest.raises(SettingsError, match="must be"):
        from_environment(NOTHING, **given)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings(mode="off", max_messages=0, refuse_with="silence")
    assert len(str(raised.value).splitlines()) == 3


def test_every_setting_says_why() -> None:
    assert all(field.metadata["why"] for field in FIELDS.values())
    assert {field.name for field in dataclasses.fields(Settings)} == set(FIELDS)


async def nothing(scope: object, receive: object, send: object) -> None: ...


def test_a_server_that_constructs_it_without_arguments_gets_the_environments_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `vllm serve --middleware guard_middleware.GuardMiddleware` does (build_app in
    vllm/entrypoints/openai/api_server.py): a class, found by its path, of FastAPI's application."""
    monkeypatch.setenv("GUARDED_GUARD", "unix:/run/guard.sock")
    monkeypatch.setenv("GUARDED_POLICY", "strict")
    module, _, name = "guard_middleware.GuardMiddleware".rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert inspect.isclass(found)
    app = FastAPI()
    app.add_middleware(found)  # type: ignore[arg-type]
    made: Any = app.build_middleware_stack()
    while not isinstance(made, GuardMiddleware):
        made = made.app
    assert isinstance(made.guard, RemoteGuard)
    assert made.settings.policy == "strict" and not isinstance(made.guard, LocalGuard)


def test_without_any_setting_there_is_a_guard_in_this_process() -> None:
    made = GuardMiddleware(nothing, settings=Settings())
    assert isinstance(made.guard, LocalGuard) and made.settings.mode == "enforce"


def test_every_setting_stands_in_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "middleware/README.md").read_text()
    missing = [name for name in FIELDS if f"| `{name}` |" not in readme]
    assert not missing
