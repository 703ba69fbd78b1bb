"""What our commands are told by flags and environment: places, and how logs look."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import __main__ as command
from guard_middleware.flags import set_up_logs, take_places
from guard_middleware.metrics import Metrics
from guard_middleware.reports import report
from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places
from guard_middleware.testing import fake_verdict
from guard_policies.assessment import Action, Direction

PREFIX = "GUARD_SIDECAR_"


def taken(flags: dict[str, Any], **environment: str) -> Places:
    variables = {f"{PREFIX}{name}": value for name, value in environment.items()}
    return take_places(Places, PREFIX, flags, {"HOME": "/", "GUARDED_GUARD": "x", **variables})


def test_places_come_from_flags_and_below_them_from_the_environment() -> None:
    flags = {"listen": "127.0.0.1:1", "guard": "x"}
    found = taken(flags, UPSTREAM="http://a.test", LISTEN="127.0.0.1:2", DRAIN_S="7.5")
    assert found == Places("http://a.test", listen="127.0.0.1:1", drain_s=7.5)
    assert flags == {"guard": "x"}  # the rest are settings


def test_what_kubernetes_says_of_a_service_of_that_name_is_no_place() -> None:
    links = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "PORT": "tcp://10.0.0.1:80"}
    found = taken({}, UPSTREAM="http://a.test", **links, PORT_80_TCP_ADDR="10.0.0.1")
    assert found == Places("http://a.test")


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ValueError) as raised:
        taken({}, LISTN="127.0.0.1:1", CONNECTIONS="many")
    assert str(raised.value).splitlines() == [
        "GUARD_SIDECAR_LISTN: there is no such place",
        "GUARD_SIDECAR_CONNECTIONS: is not a number",
        "upstream: must be given, as --upstream or GUARD_SIDECAR_UPSTREAM",
    ]


def test_wrong_places_end_the_command_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([]) == command.USAGE
    assert "upstream: must be given" in capsys.readouterr().err
    monkeypatch.setenv(f"{PREFIX}UPSTREAM", "ftp://a.test")
    assert command.main([]) == command.USAGE
    assert "upstream: must be http://" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["json", "auto", "text"])
def test_an_exchange_is_a_line_of_the_log(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs({"log_level": "info", "log_format": style})
    outcome = fake_verdict(Action.ALLOW, Direction.PROMPT, "v-7")
    metrics = Metrics(CollectorRegistry())
    report(metrics, Settings(), "e-1", "ollama", "passed", [(Direction.PROMPT, outcome)])
    told = capsys.readouterr().err
    if style == "text":
        assert told == "exchange e-1 (enforce): ollama passed, verdicts v-7\n"
        return
    line = json.loads(told)
    assert (line["level"], line["exchange"], line["format"]) == ("info", "e-1", "ollama")
    assert (line["mode"], line["result"], line["verdicts"]) == ("enforce", "passed", ["v-7"])
