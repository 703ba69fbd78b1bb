"""guard-service pull: the licence is shown first, the gate explained, the token kept."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guard_service.__main__ import main
from guard_service.hub import Hub, HubError
from guard_service.pulled import PULLED_FILE
from tests.service.fake_hub import FILES, REPOSITORY, FakeHub, Request
from tests.service.pull.conftest import TOKEN, Failure, Run, pulled

library = pytest.importorskip("huggingface_hub")


def test_nothing_is_asked_for_before_the_licence_is_accepted(
    hub: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))  # not a terminal
    command = ["pull", REPOSITORY, "--to", str(folder), "--endpoint", hub.endpoint]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "Llama 3.2 Community License" in said and "llama.com/llama3_2/license" in said
    assert "Built with Llama" in said and "--accept-licence" in said
    assert not hub.asked and not folder.parent.exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "code"), [("yes\n", 0), ("y\n", 1), ("\n", 1), ("", 1)])
def test_a_person_at_a_terminal_is_asked(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["pull", REPOSITORY, "--to", str(folder), "--endpoint", hub.endpoint]) == code
    assert folder.exists() == (code == 0) == bool(hub.asked)


@pytest.mark.parametrize(
    ("repository", "says"),
    [
        ("meta-llama/Llama-Guard-3-8B", "llama3_1/license"),
        ("meta-llama/Llama-Guard-3-11B-Vision", "European Union"),
        ("someone/else", "not known here"),
    ],
)
def test_each_model_has_its_own_terms(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], repository: str, says: str
) -> None:
    main(["pull", repository, "--endpoint", hub.endpoint])
    said = capsys.readouterr().err
    assert says in said and f"{hub.endpoint}/{repository}" in said


@pytest.mark.parametrize("given", [None, "hf_of_somebody_else"])
def test_gated_model_explains_the_gate(
    failure: Failure,
    hub: FakeHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
) -> None:
    hub.token = TOKEN
    if given:
        monkeypatch.setenv("HF_TOKEN", given)
    said = failure()
    assert f"{hub.endpoint}/{REPOSITORY}" in said and "accept its terms" in said
    assert ("without a token" in said) == (given is None)
    assert not (given and given in said) and not folder.exists()


def test_token_of_the_environment_opens_the_gate(
    run: Run, hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run() == 0
    assert pulled(folder) == FILES
    assert TOKEN not in (folder / PULLED_FILE).read_text()


def test_token_of_a_file_counts_before_the_environment(
    run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert run("--token-file", str(tmp_path / "token")) == 0


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff\xfe", b"x" * 2000])
def test_file_without_a_token_is_said_and_not_shown(
    failure: Failure, hub: FakeHub, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "token").write_bytes(content)
    said = failure("--token-file", str(tmp_path / "token"))
    assert "does not hold a token" in said and "two words" not in said and not hub.asked


def test_missing_token_file_is_said(failure: Failure) -> None:
    assert "/nowhere: No such file" in failure("--token-file", "/nowhere")


def test_token_that_lies_on_the_machine_is_not_taken(
    run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stored").write_text(TOKEN)
    monkeypatch.setattr(library.constants, "HF_TOKEN_PATH", str(tmp_path / "stored"))
    assert run() == 0
    assert not any("authorization" in map(str.lower, headers) for _, _, headers in hub.asked)


def test_hub_that_repeats_the_token_does_not_get_it_shown(
    run: Run,
    hub: FakeHub,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    answers: list[Callable[[Request], None]] = [
        lambda ask: ask.refuse(403, "GatedRepo", ask.headers["authorization"]),
        lambda ask: ask.refuse(400, "Bad", ask.headers["authorization"]),
        lambda ask: ask.refuse(503, "Busy", ask.headers["authorization"]),
        lambda ask: ask.redirect(f"http://127.0.0.1:1/{TOKEN}"),
        lambda ask: ask.redirect(f"gopher://{TOKEN}"),
        lambda ask: ask.send(200, TOKEN.encode(), {"Content-Encoding": "gzip"}),
        lambda ask: ask.send_json({**hub.listing(), "sha": TOKEN}),
        lambda ask: ask.send_json({**hub.listing(), "id": TOKEN}),
    ]
    for answer in answers:
        hub.answers[hub.list_path] = answer
        assert run() == 1
        said = capfd.readouterr()
        assert TOKEN not in said.err + said.out + caplog.text
        assert "Traceback" not in said.err


def test_token_is_not_sent_on_to_another_host(
    run: Run, hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    name = "model-00001-of-00002.safetensors"
    with FakeHub(REPOSITORY, hub.files).serving() as other:
        for host in ("127.0.0.1", "localhost"):
            to = other.endpoint.replace("127.0.0.1", host) + hub.file_path(name)
            hub.answers[hub.file_path(name)] = lambda ask, to=to: ask.redirect(to)  # type: ignore[misc]
            assert run() == 0
            assert pulled(folder) == FILES
            shutil.rmtree(folder)
        assert len(other.asked) == 2
        sent = {header.lower() for _, _, headers in other.asked for header in headers}
        assert not sent & {"authorization", "cookie"}
    assert all(headers["authorization"] for _, _, headers in hub.asked)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://hub.example",
        "ftp://hub.example",
        "hub.example",
        "https://",
        "https://me:secret@hub.example",
        "https://hub.example/?a=b",
        "https://hub.example:port",
        "https://hub.example/\n",
        "http://127.0.0.1@hub.example",
        "http://localhost.example",
    ],
)
def test_unsafe_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(HubError, match="https://HOST"):
        Hub(endpoint, TOKEN)


def test_token_is_not_in_the_hubs_repr() -> None:
    assert TOKEN not in repr(Hub("https://hub.example", TOKEN))
