"""guardctl check, info and policies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service import __version__
from guard_service.cli.app import app
from tests.middleware.fake_service import FakeService, Refusal, socket_in, verdict

RUN = CliRunner()


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (verdict_pb2.ACTION_ALLOW, 0),
        (verdict_pb2.ACTION_FLAG, 10),
        (verdict_pb2.ACTION_BLOCK, 20),
    ],
)
def test_exit_code_tells_the_action(
    service: FakeService,
    server: list[str],
    action: verdict_pb2.Action.ValueType,
    code: int,
) -> None:
    service.script = [verdict(action, 0.5)]
    assert RUN.invoke(app, ["check", "hello", *server]).exit_code == code


def test_people_see_action_score_categories_and_notice(
    service: FakeService, server: list[str]
) -> None:
    service.script = [verdict(verdict_pb2.ACTION_BLOCK, 0.9)]
    shown = RUN.invoke(app, ["check", "hello", *server]).stdout.splitlines()
    assert shown[0].startswith("BLOCK  unsafe 0.900  the prompt, policy default 1, model fake")
    assert shown[1].startswith("  S10 Name of S10  0.675 ")
    assert shown[1].endswith("at 0.5 block")
    assert shown[2].startswith("  S1 Name of S1    0.225 ")
    assert shown[3] == "  This is a starter guard."


def test_output_without_a_terminal_is_plain(server: list[str]) -> None:
    assert "\x1b" not in RUN.invoke(app, ["check", "hello", *server]).stdout


def test_what_was_not_judged_is_told(service: FakeService, server: list[str]) -> None:
    partial = verdict()
    partial.coverage.complete = False
    part = partial.coverage.parts.add(part_index=1, kind=verdict_pb2.PART_KIND_IMAGE)
    part.state, part.reason = verdict_pb2.PART_STATE_NOT_JUDGED, "MODEL_IS_TEXT_ONLY"
    service.script = [partial]
    shown = RUN.invoke(app, ["check", "hello", *server]).stdout
    assert "! NOT JUDGED: message 1, part 2 (image): MODEL_IS_TEXT_ONLY" in shown


def test_shadow_policy_says_what_it_would_have_done(
    service: FakeService, server: list[str]
) -> None:
    shadowed = verdict()
    shadowed.shadow_action = verdict_pb2.ACTION_BLOCK
    service.script = [shadowed]
    result = RUN.invoke(app, ["check", "hello", *server])
    assert result.exit_code == 0
    assert "shadow policy: would block" in result.stdout


def test_words_of_a_server_cannot_steer_the_terminal(
    service: FakeService, server: list[str]
) -> None:
    hostile = verdict(score=0.9)
    hostile.policy.name = "x\x1b[2J[red]"
    hostile.categories[1].name = "\x9b2J"
    service.script = [hostile]
    shown = RUN.invoke(app, ["check", "hello", *server]).stdout
    assert "\x1b" not in shown and "\x9b" not in shown
    assert "[red]" in shown


def test_json_holds_the_whole_verdict(service: FakeService, server: list[str]) -> None:
    service.script = [verdict(verdict_pb2.ACTION_FLAG, 0.4)]
    result = RUN.invoke(app, ["check", "hello", "--json", *server])
    told = json.loads(result.stdout)
    assert told["judged"] is True
    assert (told["action"], told["unsafe_score"]) == ("flag", pytest.approx(0.4))
    assert [category["code"] for category in told["categories"]] == ["S1", "S10"]
    assert told["policy"]["name"] == "default"
    assert told["coverage"]["complete"] is True
    assert told["notice"] == "This is a starter guard."
    assert result.stdout.count("\n") == 1


def test_could_not_judge_is_exit_code_1_and_never_an_action(
    service: FakeService, server: list[str]
) -> None:
    service.script = [Refusal(grpc.StatusCode.INTERNAL, "ENGINE_FAILED", {"request_id": "r1"})]
    result = RUN.invoke(app, ["check", "hello", "--json", *server])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["judged"] is False
    assert "action" not in json.loads(result.stdout)
    assert "could not judge: ENGINE_FAILED: refused (request r1)" in result.stderr


def test_nobody_listening_is_exit_code_1(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["check", "x", "-s", socket_in(tmp_path), "--timeout", "0.2"])
    assert result.exit_code == 1
    assert "UNAVAILABLE" in result.stderr


def test_standard_input_is_judged_but_for_its_last_newline(
    service: FakeService, server: list[str]
) -> None:
    for arguments in (["check", "-"], ["check"]):
        RUN.invoke(app, [*arguments, *server], input=" two\nlines \n")
    texts = [asked.conversation.messages[0].parts[0].text for asked in service.asked]
    assert texts == [" two\nlines "] * 2


def test_role_and_context_make_a_conversation(service: FakeService, server: list[str]) -> None:
    arguments = ["check", "c", "--role", "assistant", "--context", "a", "--context", "b"]
    RUN.invoke(app, [*arguments, "-p", "strict", "-l", "de", *server])
    asked = service.asked[0]
    turns = [(one.role, one.parts[0].text) for one in asked.conversation.messages]
    assert turns == [
        (guard_pb2.ROLE_ASSISTANT, "a"),
        (guard_pb2.ROLE_USER, "b"),
        (guard_pb2.ROLE_ASSISTANT, "c"),
    ]
    assert (asked.policy, asked.language) == ("strict", "de")


def test_image_is_sent_as_it_is_with_the_text_behind(
    service: FakeService, server: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    RUN.invoke(app, ["check", "look", "--image", str(tmp_path / "x.png"), *server])
    parts = service.asked[0].conversation.messages[0].parts
    assert parts[0].image.data == b"\x89PNG"
    assert parts[1].text == "look"


@pytest.mark.parametrize("wrapped", [False, True])
def test_conversation_comes_from_a_file_or_from_standard_input(
    service: FakeService, server: list[str], tmp_path: Path, wrapped: bool
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = json.dumps({"messages": turns} if wrapped else turns)
    (tmp_path / "c.json").write_text(text)
    RUN.invoke(app, ["check", "--file", str(tmp_path / "c.json"), *server])
    RUN.invoke(app, ["check", "--file", "-", *server], input=text)
    assert [len(asked.conversation.messages) for asked in service.asked] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (["check", "x", "--file", "-"], "[]", "--file holds all of it"),
        (["check", "--file", "-"], "{", "not JSON: line 1, column 2"),
        (["check", "--file", "-"], "[" * 100_000, "nested too deeply"),
        (["check", "--file", "-"], "7", "neither a list of turns"),
        (["check", "--file", "-"], '[{"role": "x"}]', "messages[0].role"),
        (["check", "--file", "nowhere.json"], "", "nowhere.json"),
        (["check", "-"], "", "nothing on standard input"),
        (["check", "-"], b"\xff", "not UTF-8"),
        (["check", "x", "--role", "system"], "", "--role is user or assistant"),
        (["check", "x", "--model", "fake", "--server", "a:1"], "", "without --server"),
        (["check", "x", "--cert", __file__, "--server", "a:1"], "", "needs its key"),
        (["check", "x", "--server", "http://a:1"], "", "no guard's address"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], stdin: str | bytes, told: str) -> None:
    result = RUN.invoke(app, arguments, input=stdin)
    assert result.exit_code == 2
    assert told in result.stderr


def test_server_comes_from_the_environment_too(
    service: FakeService, server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDCTL_SERVER", server[1])
    assert RUN.invoke(app, ["check", "x"]).exit_code == 0
    assert len(service.asked) == 1


def test_without_a_server_a_guard_runs_inside() -> None:
    result = RUN.invoke(app, ["check", "hello", "--model", "fake"])
    assert result.exit_code == 0
    assert "model fake" in result.stdout


def test_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["check", "hello", "--model", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "cannot run a guard here" in result.stderr


def test_info_shows_version_model_and_limits(server: list[str]) -> None:
    result = RUN.invoke(app, ["info", *server])
    assert result.exit_code == 0
    for told in ("guard 9.9.9  serving", "engine fake", "This is a starter guard.", "8 a batch"):
        assert told in result.stdout
    assert json.loads(RUN.invoke(app, ["info", "--json", *server]).stdout)["serves"] is True


def test_policies_are_listed_the_default_one_marked(server: list[str]) -> None:
    shown = RUN.invoke(app, ["policies", *server]).stdout
    assert "default 1  (default)  The usual one." in shown
    assert "prompts flag, responses block" in shown
    told = json.loads(RUN.invoke(app, ["policies", "--json", *server]).stdout)
    assert told["default_policy"] == "default"


def test_version_is_the_packages() -> None:
    assert RUN.invoke(app, ["--version"]).stdout == f"guardctl {__version__}\n"


def test_help_names_every_verb_and_the_exit_codes() -> None:
    verbs = RUN.invoke(app, ["--help"]).stdout
    assert all(verb in verbs for verb in ("check", "bulk", "bench", "info", "policies", "policy"))
    assert "0 allow, 10 flag, 20 block, 1 could not judge" in " ".join(
        RUN.invoke(app, ["check", "--help"]).stdout.split()
    )


def test_help_is_there_at_once() -> None:
    command = [sys.executable, "-c", "from guard_service.cli import main; main()", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Processor time, not wall time: other processes must not fail this test.
    before = os.times()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    after = os.times()
    spent_s = after.children_user + after.children_system
    spent_s -= before.children_user + before.children_system
    assert spent_s < 0.5, f"{spent_s:.2f} s of processor time"


def test_windows_and_images_are_told_apart(service: FakeService, server: list[str]) -> None:
    found = verdict(verdict_pb2.ACTION_ALLOW, 0.1)
    del found.coverage.windows[:]
    for span in ((0, 9), (6, 15)):
        for digest in ("sha256:a", "sha256:b", "sha256:c"):
            found.coverage.windows.add(first_token=span[0], end_token=span[1], image_digest=digest)
    service.script = [found]
    told = RUN.invoke(app, ["check", "hello", *server]).output
    assert "judged in 2 windows" in told and "judged beside 3 images" in told
