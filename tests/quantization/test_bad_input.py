"""Bad input to guard-quantize as its users meet it: a clear line, a status, nothing half made."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guard_quantization.__main__ import main
from guard_quantization.checkpoint import pipeline
from tests.quantization.bad_checkpoints import ALL, Bad, led_out
from tests.quantization.starter.test_pipeline import toy_row
from tests.quantization.tiny_llama import tiny_llama
from tests.quantization.verdict_tokenizer import verdict_ranks

RECIPE = """\
name: small
template: llama-guard-3-1b
calibration: {toy: [24, 1.0]}
prune: {layers: 1, keep_last: 0, rows: 12, held_back: 6}
distill:
  plan: {template: llama-guard-3-1b, trust: 0.0, bfloat16: false}
  epochs: [{toy: [12, 1.0]}]
  held: {toy: [6, 1.0]}
quantize: {block: 32, rows: 8}
export: {bits: 4, block: 32, embedding_bits: 4}
evaluate: {probe: false, least_rows: 5}
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a checkpoint `llama`, `data` and a recipe."""
    place = tmp_path_factory.mktemp("sound")
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=4096, initializer_range=0.05)
    model.save_pretrained(place / "llama")
    (place / "llama" / "tokenizer.model").write_bytes(verdict_ranks())
    (place / "llama" / "LICENSE.txt").write_text("terms")
    (place / "data").mkdir()
    lines = "\n".join(json.dumps(toy_row(number)) for number in range(80))
    (place / "data" / "toy.jsonl").write_text(lines + "\n")
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(sound, tmp_path / "place")
    return tmp_path / "place"


Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs guard-quantize; its status, and what it said on stderr."""
    monkeypatch.setattr(pipeline, "contrast_rows", list)  # not read here: they take a second

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["guard-quantize", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        if isinstance(ended.value.code, str):  # as the interpreter does
            return 1, f"{said}{ended.value.code}\n"
        return int(ended.value.code or 0), said

    return run


def command(name: str, place: Path) -> list[str | Path]:
    """A whole command line that would succeed in a sound place, but for what is not installed."""
    llama, out, recipe = place / "llama", place / "out", place / "recipe.yaml"
    data: list[str | Path] = ["--data", place / "data"]
    commands: dict[str, list[str | Path]] = {
        "prune": ["prune", recipe, llama, out, *data],
        "distill": ["distill", recipe, llama, out, *data],
        "quantize": ["quantize", recipe, llama, out, *data],
        "export": ["export", llama, out],
        "evaluate": ["evaluate", str(llama), *data, "--no-probe", "--out", out],
        "run": ["run", recipe, "--source", llama, *data, "--runs", out],
        "gguf": ["gguf", llama, out, "--type", "f16"],
        "reference": ["reference", llama, out],
    }
    return commands[name]


def refused(told: Told, words: list[str | Path], said: str) -> None:
    """The command ends with one line that has `said` in it, and `out` is not there."""
    status, text = told(*words)
    last = text.splitlines()[-1]
    assert status == 1 and last.startswith("guard-quantize: ")
    assert re.search(said, last), last


def nothing_made(place: Path) -> bool:
    """No result and no rest of one; a `run` may have made its empty folder."""
    files = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
    return not [file for file in files if file.parts[0].startswith(("out", ".out"))]


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_a_bad_checkpoint_is_refused_with_what_is_wrong(place: Path, told: Told, bad: Bad) -> None:
    bad.spoil(place / "llama")
    refused(told, command("export", place), bad.said)
    assert nothing_made(place)


BY_NAME = {bad.name: bad for bad in ALL}
FLOATS = ("prune", "distill", "quantize", "export", "evaluate", "run")


@pytest.mark.parametrize("bad", ["mllama", "config-cut", "no-tokenizer"])
@pytest.mark.parametrize("name", [*FLOATS, "gguf", "reference"])
def test_every_command_reads_a_checkpoint_as_strictly(
    place: Path, told: Told, name: str, bad: str
) -> None:
    if (name, bad) == ("reference", "no-tokenizer"):
        pytest.skip("optimum's export needs none")
    BY_NAME[bad].spoil(place / "llama")
    refused(told, command(name, place), BY_NAME[bad].said)
    assert nothing_made(place)


@pytest.mark.parametrize("bad", ["data-cut", "pickle", "nan", "too-many", "index-up"])
@pytest.mark.parametrize("name", FLOATS)
def test_every_command_reads_weights_as_strictly(
    place: Path, told: Told, name: str, bad: str
) -> None:
    BY_NAME[bad].spoil(place / "llama")
    refused(told, command(name, place), BY_NAME[bad].said)
    assert nothing_made(place)


def test_a_paper_that_links_elsewhere_is_not_carried_along(place: Path, told: Told) -> None:
    led_out("LICENSE.txt")(place / "llama")
    refused(told, command("prune", place), "LICENSE.txt: a link out of its folder")
    assert not [*place.glob("out*/**/LICENSE.txt")]


def test_a_snapshot_of_a_hugging_face_cache_is_read(place: Path, told: Told) -> None:
    snapshot, blobs = place / "cache" / "snapshots" / "abc", place / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (place / "llama").iterdir():
        (snapshot / file.name).symlink_to(file.rename(blobs / f"0{file.name}"))
    assert told("export", snapshot, place / "out") == (0, "")


EDITS = [
    ("prune:", "prunes:", r"recipe.yaml:4:1: the file has no key 'prunes'; did you mean 'prune'"),
    ("layers: 1", "layer: 1", r":4:9: prune has no key 'layer'; did you mean 'layers'"),
    ("layers: 1", "layers: one", r":4:17: prune.layers must be a number like 0.5, not 'one'"),
    ("layers: 1", "layers: 1.5", r":4:17: prune.layers must be a whole number"),
    ("layers: 1", "layers: -1", r":4:8: prune.layers is -1, must be at least 0"),
    ("layers: 1", "layers: 3", r"prune.layers is 3, must be 0 to 2"),
    ("rows: 12", "rows: 12, rows: 13", r":4:44: 'rows' is given twice"),
    ("rows: 12", "rows: 10000", r"24 calibration rows; prune.rows and prune.held_back want 10006"),
    ("held: {toy", "helt: {toy", r":5:1: distill.held is missing|no key 'helt'"),
    ("trust: 0.0", "trust: .nan", r":6:45: distill.plan.trust must be a number"),
    ("trust: 0.0", "trust: 2.0", r":6:9: distill.trust must be between 0 and 1"),
    ("bfloat16: false", "bfloat16: 3", r"distill.plan.bfloat16 must be one of true, false"),
    ("block: 32, rows", "block: 33, rows", r":9:11: quantize.block is 33, must be 32, 64, 128"),
    ("bits: 4, block", "bits: 5, block", r":10:9: weights have 4, 8 or 32 bits"),
    ("[24, 1.0]", "[24]", r":3:20: calibration.toy must be a list of 2"),
    ("[24, 1.0]", "[0, 1.0]", r"toy: rows must be 1 at least"),
    ("[24, 1.0]", "24", r"calibration.toy must be a list"),
    ("name: small", "name: ../small", r":1:7: name must be of letters"),
    ("name: small", "name: !!python/name:os.system x", r":1:7: the tag .* is not allowed"),
    ("name: small", "name: small\nname: large", r":2:1: 'name' is given twice"),
    ("template: llama-guard-3-1b\n", "", r":1:1: template is missing"),
    ("template: llama-guard-3-1b\n", "template: llama-guard-9\n", "'llama-guard-9' is unknown"),
    ("small", "[", "not YAML"),
    (RECIPE, "", "the file|must be a mapping"),
    (RECIPE, "- a\n", "must be a mapping"),
    (RECIPE, "a: " + "[" * 20 + "]" * 20, "nested too deep"),
    (RECIPE, "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", ":2:8: an alias within what an anchor"),
    (RECIPE, f"a: &a [{'x, ' * 400}]\nb: [{'*a, ' * 400}]", "aliases repeat too much"),
    (RECIPE, "a: &a [*a]", ":1:8: an alias within"),
    (RECIPE, "a: " + "x" * 300_000, "has more than 256 KiB"),
    (RECIPE, "base: ../other.yaml\nname: x", "base must name a recipe in the same folder"),
    (RECIPE, "base: recipe.yaml\nname: x", "base must be a recipe without a base"),
    (RECIPE, "base: lost.yaml\nname: x", "lost.yaml:1:1: cannot be read"),
]


@pytest.mark.parametrize(("old", "new", "said"), EDITS, ids=[edit[2][:30] for edit in EDITS])
def test_a_mistake_in_a_recipe_is_told_with_its_place(
    place: Path, told: Told, old: str, new: str, said: str
) -> None:
    assert old in RECIPE
    (place / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    status, text = told(*command("prune", place))
    assert status == 1 and re.search(said, text), text
    assert "Traceback" not in text and nothing_made(place)


def rows_of(text: str) -> Callable[[Path], object]:
    return lambda data: (data / "toy.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: (data / "toy.jsonl").unlink(), "no .jsonl or .jsonl.gz file here"),
        (lambda data: (data / "toy.jsonl").write_text("{"), "toy.jsonl:1: not a labelled row"),
        (
            lambda data: (data / "toy.jsonl").write_text('{"id": "a"}'),
            "toy.jsonl:1: the row has no",
        ),
        (lambda data: (data / "toy.jsonl").write_text("[]"), "toy.jsonl:1: not a labelled row"),
        (lambda data: (data / "toy.jsonl").write_text(""), "calibration rows|no row of split"),
        (lambda data: (data / "toy.jsonl").rename(data / "toy.jsonl.gz"), "toy.jsonl.gz: the file"),
        (lambda data: (data / "x.jsonl").mkdir(), "x.jsonl: Is a directory"),
        (shutil.rmtree, "does not exist"),
    ],
)
@pytest.mark.parametrize("name", ["prune", "evaluate"])
def test_bad_data_is_told_with_its_file(
    place: Path, told: Told, name: str, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(place / "data")
    status, text = told(*command(name, place))
    assert status in (1, 2) and re.search(said, text), text
    assert nothing_made(place)


@pytest.mark.parametrize("name", [*FLOATS, "gguf"])
def test_what_is_there_already_is_not_written_over(place: Path, told: Told, name: str) -> None:
    out = place / "out" / "small" / "prune" if name == "run" else place / "out"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep")
    status, text = told(*command(name, place))
    assert status == 1 and re.search("never written over|it is not of this program", text), text
    assert [path.name for path in out.rglob("*")] == ["mine.txt"]


@pytest.mark.parametrize("name", [*FLOATS])
def test_a_place_that_cannot_be_written_is_named(place: Path, told: Told, name: str) -> None:
    (place / "file").write_text("")
    words = [place / "file" / "out" if word == place / "out" else word
             for word in command(name, place)]  # fmt: skip
    refused(told, words, "file.*: (Not a directory|File exists)")


@pytest.mark.parametrize("name", ["prune", "quantize", "export", "run"])
def test_a_disk_that_is_too_small_is_told_before_work_begins(
    place: Path, told: Told, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(told, command(name, place), r"MiB are needed, 0\.0 MiB are free; make room")
    assert nothing_made(place)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that fills: what a file would have beyond `size` bytes is not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["prune", "distill", "quantize", "export", "evaluate"])
def test_a_disk_that_fills_leaves_no_result(place: Path, told: Told, name: str) -> None:
    with files_of_at_most(7000):
        refused(told, command(name, place), "File too large|cannot be written")
    assert not (place / "out").exists()
