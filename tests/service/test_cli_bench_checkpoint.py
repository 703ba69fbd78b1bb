"""guardctl bench engine on a checkpoint: what is asked, what is counted; guardctl expect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard_service.cli.app import app
from guard_service.cli.bench_checkpoint import Setting, Subject, figures
from guard_service.cli.bench_checkpoint_table import show_checkpoint
from guard_service.cli.expecting import Device, expected
from guard_service.engines.torch.geometry import read_geometry
from guard_service.engines.torch.published import PUBLISHED
from tests.service.torch.checkpoints import saved, tiny_llama, tiny_mllama

RUN = CliRunner()
SHEET = Device("a card", 100.0, 1000.0, 80.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_mllama(), tmp_path_factory.mktemp("bench") / "tiny-vision")


@pytest.fixture(scope="module")
def report(vision: Path) -> dict[str, Any]:
    return figures(Setting(str(vision), threads=1, repeats=1))


def case(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in report["cases"] if one["case"].startswith(name))
    return dict(found)


def test_every_case_is_new_but_for_what_it_is_about(vision: Path) -> None:
    subject = Subject(Setting(str(vision), threads=1))
    for _, make in subject.cases.named():
        one, other = make(), make()
        assert one.prompt.body != other.prompt.body
        if one.prompt.image is not None:
            assert one.prompt.image != other.prompt.image
    made = dict(subject.cases.named())
    seen = made["image seen again, other words"]()
    assert seen.before[0].image == seen.prompt.image and seen.before[0].body != seen.prompt.body
    policy = made["image seen again, second policy"]()
    assert policy.before[0].prefix != policy.prompt.prefix
    new = made["image, never seen, 4 tiles"]()
    assert all(one.image is None for one in new.before)
    assert [subject.tiles(made[f"image, never seen, {n}"]().prompt) for n in ("one tile", "4 tiles")
            ] == [1, 4]  # fmt: skip
    assert len({one.image for one in subject.cases.batch(4, 4)}) == 4
    assert len({one.image for one in subject.cases.batch(4, 1)}) == 1


def test_what_caches_save_is_counted_in_tokens(report: dict[str, Any]) -> None:
    text = case(report, "text of 40")
    assert text["kept_tokens"] > 100 and text["computed_tokens"] < 140
    assert text["computed_without_caches"] == text["prompt_tokens"]
    assert case(report, "image, never seen, 4")["kept_tokens"] == 0
    again = case(report, "image seen again, other words")
    assert again["kept_tokens"] > 100
    assert again["computed_tokens"] + again["kept_tokens"] == again["prompt_tokens"]
    second = case(report, "image seen again, second policy")
    assert 0 < second["kept_tokens"] < 20  # what stands before the image's token is every policy's
    reply = case(report, "a reply that grew by 32, with image")
    assert reply["kept_tokens"] > reply["computed_tokens"]
    assert case(report, "third turn")["kept_tokens"] > 100


def test_an_image_that_is_known_costs_no_look_at_it(report: dict[str, Any]) -> None:
    new, again = case(report, "image, never seen, 4"), case(report, "image seen again, other")
    text = case(report, "text of 40")
    assert new["gflop"] > again["gflop"] > text["gflop"] > 0


def test_all_contenders_take_part_in_every_case(report: dict[str, Any]) -> None:
    for one in report["cases"]:
        assert set(one["times"]) == {"kept", "bare", "generate safe", "generate unsafe"}
        assert one["times"]["kept"]["times_ours"] == 1
        assert all(len(times["all_ms"]) == 1 for times in one["times"].values())
        assert one["share_of_matrix_rate"] > 0 and one["share_of_bandwidth"] > 0
    kinds = {(one["prompts"], one["size"]) for one in report["batches"]}
    assert len(kinds) == 9 and all(one["verdicts_per_s"] > 0 for one in report["batches"])
    assert 0 < report["memory"]["loaded_mib"] <= report["memory"]["peak_mib"]
    assert report["memory"]["image_cache_mib"] > 0


def test_the_table_tells_every_case(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    show_checkpoint(report)
    shown = capsys.readouterr().out
    assert all(one["case"] in shown for one in report["cases"])
    assert "each a new image" in shown and "TFLOP/s" in shown
    show_checkpoint({**report, "memory": {**report["memory"], "cuda_peak_mib": 7.0,
                                          "cuda_reserved_mib": 8.0}})  # fmt: skip
    assert "GPU memory 7 MiB at most" in capsys.readouterr().out


def test_a_text_checkpoint_is_asked_text_only(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "tiny-text")
    run = ("bench", "engine", "--model", str(folder), "--repeats", "1", "--threads", "1", "--json")
    result = RUN.invoke(app, run)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert not any("image" in one["case"] for one in found["cases"])
    assert {one["prompts"] for one in found["batches"]} == {"text"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--peer", "gguf=/a"), "are for artifacts"),
        (("--dtype", "float8"), "--dtype must be one of"),
        (("--device", "tpu"), "--device must be one of"),
    ],
)
def test_what_does_not_go_with_a_checkpoint_is_said(
    vision: Path, flags: tuple[str, ...], said: str
) -> None:
    result = RUN.invoke(app, ["bench", "engine", "--model", str(vision), *flags])
    assert result.exit_code == 2 and said in result.stderr


def geometry(name: str) -> Any:
    return read_geometry(json.dumps(PUBLISHED[name]).encode())


def test_expected_times_are_products_or_bytes_whichever_takes_longer() -> None:
    found = expected(geometry("11b-vision"), SHEET, "bfloat16", 40)["cases"]
    for name in ("text, policy known", "looking at an image", "image seen again, same policy"):
        one = found[name]
        slower = max(one["gflop"] / (100e3 * 0.5), one["mb_moved"] / (1e6 * 0.5)) * 1000
        assert one["ms"] == pytest.approx(slower)
    looked = found["looking at an image"]["ms"] + found["image seen again, another policy"]["ms"]
    assert found["image, never seen"]["ms"] == pytest.approx(looked)
    assert found["image by generate, unsafe"]["ms"] > found["image by generate, safe"]["ms"]
    assert found["batch of 16 texts, policy known"]["verdicts_per_s"] > 1


def test_expected_sizes_follow_how_weights_are_held() -> None:
    whole = expected(geometry("11b-vision"), SHEET, "bfloat16", 40)
    small = expected(geometry("11b-vision"), SHEET, "int4", 40)
    assert whole["weights_gib"] == pytest.approx(10_670_220_835 * 2 / 2**30)
    assert whole["weights_gib"] / 4 < small["weights_gib"] < whole["weights_gib"] / 2
    assert (
        whole["fits"]
        and not expected(geometry("11b-vision"), replace(SHEET, gib=16.0), "bfloat16", 40)["fits"]
    )
    assert "looking at an image" not in expected(geometry("8b"), SHEET, "float32", 40)["cases"]


def test_expect_takes_names_and_folders(vision: Path) -> None:
    for model in ("1b", "11b-vision", str(vision), str(vision / "config.json")):
        result = RUN.invoke(app, ["expect", model, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["cases"]["text, policy known"]["ms"] > 0
    shown = RUN.invoke(app, ["expect", "11b-vision", "--gib", "16"]).stdout
    assert "DOES NOT FIT" in shown and "image by generate, unsafe" in shown
    for wrong in (["expect", "70b"], ["expect", "1b", "--weights", "int2"]):
        assert RUN.invoke(app, wrong).exit_code == 2
