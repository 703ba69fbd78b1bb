"""guard-service pull against a hub that lies: an error, and nothing in place."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guard_service.__main__ import main
from tests.service.fake_hub import COMMIT, REPOSITORY, WEIGHTS, FakeHub, Request, blob_of
from tests.service.pull.conftest import Failure

library = pytest.importorskip("huggingface_hub")


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "a/../../config.json",
        "/etc/model.safetensors",
        "..\\config.json",
        "a//b",
        "./config.json",
        "config.json\n",
        "\x1b[2J",
        "",
        None,
        7,
    ],
)
def test_names_that_lead_elsewhere_end_the_pull(
    failure: Failure, hub: FakeHub, folder: Path, name: object
) -> None:
    bad = {"rfilename": name, "size": 1, "blobId": blob_of(b"x")}
    hub.lie(siblings=[*hub.listing()["siblings"], bad])
    said = failure()
    assert "lists a file" in said and said.isprintable()
    assert not folder.parent.exists()


def entries(**changed: object) -> Callable[[FakeHub], dict[str, Any]]:
    """A listing whose first file (config.json) has other values."""

    def change(hub: FakeHub) -> dict[str, Any]:
        first, *others = hub.listing()["siblings"]
        return {"siblings": [{**first, **changed}, *others]}

    return change


LIES: dict[str, tuple[Callable[[FakeHub], dict[str, Any]], str]] = {
    "no commit": (lambda hub: {"sha": None}, "which commit"),
    "a commit that is a path": (lambda hub: {"sha": "../../x"}, "which commit"),
    "another repository": (lambda hub: {"id": "some/other"}, "another repository"),
    "no files": (lambda hub: {"siblings": None}, "lists no files"),
    "an empty list": (lambda hub: {"siblings": []}, "has no config.json"),
    "a file twice": (
        lambda hub: {"siblings": hub.listing()["siblings"] * 2},
        "lists a file twice",
    ),
    "too many files": (
        lambda hub: {
            "siblings": [hub.entry(f"{at}.safetensors", b"") for at in range(300)]
            + hub.listing()["siblings"]
        },
        "more than 256",
    ),
    "no size": (entries(size=None), "config.json: the hub lists no size"),
    "a negative size": (entries(size=-1), "config.json: the hub lists no size"),
    "a size that is no number": (entries(size=True), "config.json: the hub lists no size"),
    "a huge document": (entries(size=2**40), "config.json: the hub lists no size"),
    "no digest": (entries(blobId=None), "config.json: the hub lists no digest"),
    "a digest of another kind": (entries(blobId="abc"), "config.json: the hub lists no digest"),
    "no sha256": (entries(lfs={"sha256": None}), "config.json: the hub lists no digest"),
    "a wrong size": (entries(size=5), "config.json: the hub sends more than 5 bytes"),
    "a larger size": (entries(size=99), "config.json: 23 bytes came, the hub lists 99"),
    "a wrong sha1": (entries(blobId="0" * 40), "config.json: its digest"),
    "a wrong sha256": (entries(lfs={"sha256": "0" * 64}), "config.json: its digest"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_the_list_end_the_pull(
    failure: Failure, hub: FakeHub, folder: Path, lie: str
) -> None:
    changed, says = LIES[lie]
    hub.lie(**changed(hub))
    assert says in failure()
    assert not folder.exists()
    assert not folder.parent.exists() or not any(folder.parent.iterdir())


def test_another_commit_than_the_one_named_is_refused(failure: Failure, hub: FakeHub) -> None:
    named = "d" * 40
    path = hub.list_path.replace("main", named)
    hub.answers[path] = lambda ask: ask.send_json(hub.listing())
    assert "answers with commit" in failure("--revision", named)


def test_changed_content_is_refused_and_not_kept(
    failure: Failure, hub: FakeHub, folder: Path
) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.answers[hub.file_path(name)] = lambda ask: ask.send(200, bytes(len(WEIGHTS)))
    assert f"{name}: its digest" in failure()
    assert not folder.exists()
    assert not (folder.with_name(f".{folder.name}.part") / name).exists()


@pytest.mark.parametrize("place", ["list", "file"])
def test_endless_bodies_are_cut(
    failure: Failure,
    hub: FakeHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    monkeypatch.setattr("guard_service.hub._MAX_LISTING_BYTES", 100_000)
    path = hub.list_path if place == "list" else hub.file_path("config.json")
    hub.answers[path] = Request.send_endlessly
    assert "sends more than" in failure()
    assert not folder.exists()


def test_compressed_bodies_are_bounded_by_what_they_unfold_to(
    failure: Failure, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard_service.hub._MAX_LISTING_BYTES", 100_000)
    bomb = gzip.compress(bytes(2_000_000))
    hub.answers[hub.list_path] = lambda ask: ask.send(200, bomb, {"Content-Encoding": "gzip"})
    assert "sends more than" in failure()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "lists no files"),
        (b"", "not JSON"),
    ],
)
def test_answers_that_are_no_list_are_said(
    failure: Failure, hub: FakeHub, body: bytes, says: str
) -> None:
    hub.answers[hub.list_path] = lambda ask: ask.send(200, body)
    assert says in failure()


def test_silence_ends_in_an_error(
    failure: Failure,
    hub: FakeHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.answers[hub.file_path("config.json")] = Request.stay_silent
    assert "config.json: the connection to" in failure()
    assert not folder.exists()


def test_redirects_in_a_circle_end(failure: Failure, hub: FakeHub) -> None:
    hub.answers[hub.list_path] = lambda ask: ask.redirect(ask.path)
    assert "the connection to" in failure()


def test_hub_that_is_down_is_said(
    folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ["--to", str(folder), "--endpoint", "http://127.0.0.1:1", "--accept-licence"]
    assert main(["pull", REPOSITORY, *to]) == 1
    assert "the connection to http://127.0.0.1:1 failed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["guard", "../guard", "a/b/c", "a/..", "a/b?x", "/a"])
def test_repository_must_be_owner_and_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["pull", name, "--accept-licence"]) == 1
    assert "OWNER/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["", "../main", "a b", "-x", "a?b"])
def test_revision_must_be_a_plain_word(failure: Failure, hub: FakeHub, revision: str) -> None:
    assert "revision must be" in failure(f"--revision={revision}")
    assert not hub.asked


def test_fake_hub_is_one_for_the_librarys_own_client(hub: FakeHub, tmp_path: Path) -> None:
    """What the tests above rest on: the fake speaks as hubs do."""
    found = library.HfApi(hub.endpoint, token=False).model_info(REPOSITORY, files_metadata=True)
    assert found.sha == COMMIT and {one.rfilename for one in found.siblings} == hub.files.keys()
    name = "model-00001-of-00002.safetensors"
    path = library.hf_hub_download(
        REPOSITORY, name, endpoint=hub.endpoint, token=False, cache_dir=tmp_path
    )
    assert Path(path).read_bytes() == WEIGHTS
