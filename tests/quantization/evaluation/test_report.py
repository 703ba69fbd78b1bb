"""The page: whole, self-contained, and safe whatever names stand in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from guard_quantization.evaluation import plots, report
from guard_quantization.evaluation.compare import compare
from guard_quantization.evaluation.making import write_stages_page
from guard_quantization.evaluation.markup import page
from guard_service.evaluation.report import evaluate
from tests.service.labelled import noisy, row, scores

EVIL = '<script>alert("x")</script>$\\frac{'


class Tags(HTMLParser):
    """Tags, attributes and text of a page; every tag that opens must close."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def images(tags: Tags) -> list[ElementTree.Element]:
    found = []
    for source in tags.sources:
        head, data = source.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        found.append(ElementTree.fromstring(base64.b64decode(data)))
    return found


STEP = {"parameters": 10, "p_unsafe_difference": 0.1, "verdict_agreement": 0.9, "kl": 0.01}
MATRIX = {"nearest": 0.2, "error": 0.1}
FIGURES: dict[str, Any] = {
    "prune": {
        "steps": [
            {"step": "source", "mib": 2858.0, **STEP},
            {"step": "head", "mib": 1641.0, **STEP},
        ],
        "blocks": [0.9, 0.1, 0.5],
        "kept_layers": [0, 2],
        "neurons": {"percentiles": [[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]], "kept_share": [1.0, 1.0]},
        "sizes": {"intermediate_size": [8, 6]},
    },
    "distill": {
        "examples": 12,
        "curve": [[0, 2.0], [100, 0.5]],
        "before": {"accuracy": 0.5},
        "after": {"accuracy": 0.75},
    },
    "quantize": {
        "layers": [{"matrices": {"mlp.down_proj": MATRIX}, "int8_inputs": {"mlp.up_proj": 0.01}}],
        "mib_before": 1641.0,
        "mib": 430.0,
    },
    "export": {
        "mib": {"model.onnx": 1.0, "weights": 414.0, "tokenizer.json": 9.0},
        "parameters": 9,
    },
    "evaluate": {"accuracy": {"source": {"f1": 0.9, "auroc": 0.95}, "model": {"f1": None}}},
}


def stage(folder: Path, name: str, figures: dict[str, Any]) -> Path:
    (folder / name).mkdir()
    record = {"seconds": 12.3, "peak_mib": 1000.0, "versions": {"torch": "2"}, "figures": figures}
    (folder / name / "stage.json").write_text(json.dumps(record))
    return folder / name


def page_of(heading: str, *parts: Iterable[str]) -> Tags:
    return Tags(page(heading, chain.from_iterable(parts)))


def test_page_shows_how_a_guard_judges_and_fetches_nothing() -> None:
    rows, said = noisy(80)
    found, beside = evaluate(rows, said), compare(rows, said, noisy(80, seed=2)[1])
    tags = page_of(
        "starter",
        report.broken_limits(["auroc: too low"]),
        report.evaluation(found),
        report.comparison(beside),
    )
    for text in ("By language", "By category", "Against the reference", "auroc: too low"):
        assert text in tags.text
    assert "script" not in tags.seen and "link" not in tags.seen
    # calibration, ROC and PR; three figures of three dimensions; two of categories
    assert len(images(tags)) == 3 + 9 + 2


def test_page_gathers_what_all_stages_recorded(tmp_path: Path) -> None:
    folders = {name: stage(tmp_path, name, figures) for name, figures in FIGURES.items()}
    write_stages_page(tmp_path / "report.html", "run", folders)
    tags = Tags((tmp_path / "report.html").read_text())
    for text in ("1,641", "0.9000", "12 examples", "414.0", "0.950", "torch 2"):
        assert text in tags.text
    # sizes, blocks, neurons, loss, errors
    assert len(images(tags)) == 5
    sizes = ElementTree.tostring(images(tags)[0], "unicode")
    assert "415" in sizes  # graph and weights; the tokenizer counts apart
    write_stages_page(tmp_path / "report.html", "run", {"prune": folders["prune"]})
    assert "examples" not in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_stage_that_is_not_done_is_not_on_the_page(tmp_path: Path) -> None:
    folders = {"prune": tmp_path / "prune", "export": stage(tmp_path, "export", FIGURES["export"])}
    (tmp_path / "prune.part").mkdir()
    write_stages_page(tmp_path / "report.html", "run", folders)
    assert "Pruning" not in (tmp_path / "report.html").read_text()


def test_names_are_text_and_never_markup_or_mathematics(tmp_path: Path) -> None:
    rows = [row(n, n % 2 == 0, ("S1",) if n % 2 == 0 else (), EVIL, EVIL, EVIL) for n in range(40)]
    said = scores([0.9 - n / 50 for n in range(40)])
    found, beside = evaluate(rows, said), compare(rows, said, said)
    tags = page_of(
        EVIL, report.broken_limits([EVIL]), report.evaluation(found), report.comparison(beside)
    )
    evil = {**FIGURES["distill"], "before": {EVIL: 1.0}, "after": {EVIL: 1.0}}
    prune = {**FIGURES["prune"], "steps": [{"step": EVIL, "mib": 1.0, **STEP}]}
    folders = {
        "distill": stage(tmp_path, "distill", evil),
        "prune": stage(tmp_path, "prune", prune),
    }
    write_stages_page(tmp_path / "report.html", EVIL, folders)
    made = Tags((tmp_path / "report.html").read_text())
    for one in (tags, made):
        assert "script" not in one.seen and EVIL in one.text
        for image in images(one):
            assert not list(image.iter("{http://www.w3.org/2000/svg}script"))


def test_rows_of_one_class_make_a_page_without_ranking_curves() -> None:
    rows = [row(n, False) for n in range(5)]
    tags = page_of("safe only", report.evaluation(evaluate(rows, scores([0.1] * 5))))
    assert "ROC" not in tags.text.replace("AUROC", "") and "Calibration" in tags.text


def test_no_rows_and_nothing_given_still_make_a_page() -> None:
    assert "nothing" in page_of("nothing", report.broken_limits([])).text
    assert "rows" in page_of("none", report.evaluation(evaluate([], scores([])))).text


def test_same_figures_give_the_same_bytes() -> None:
    assert plots.sizes({"a": 1.0}) == plots.sizes({"a": 1.0})
    assert plots.neurons([[1.0, 2.0]], 0.5) == plots.neurons([[1.0, 2.0]], 0.5)


def test_labels_of_plots_are_short_and_in_ascii() -> None:
    assert plots.label("a\nb\u202eс日") == "a?b???"
    assert len(plots.label("x" * 500)) == 40
