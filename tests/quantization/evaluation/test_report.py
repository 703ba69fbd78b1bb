"""The page: whole, self-contained, and safe whatever names stand in it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guard_quantization.evaluation import plots
from guard_quantization.evaluation.compare import compare
from guard_quantization.evaluation.report import Stages, page, write_report
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


STAGES = Stages(
    sizes={"checkpoint": 2858.0, "pruned": 2142.0, "int4": 438.0},
    accuracy={"teacher": {"auroc": 0.95, "f1": 0.9}, "pruned": {"auroc": 0.93}},
    losses={"student": [(0, 2.0), (100, 0.5)]},
    blocks=(0.9, 0.1, 0.5),
    removed=(1,),
    neurons={"0": [3.0, 1.0, 2.0], "1": [0.0, 0.0, 0.0]},
    kept_neurons=2,
)


def test_page_shows_everything_it_was_given_and_fetches_nothing() -> None:
    rows, said = noisy(80)
    report, comparison = evaluate(rows, said), compare(rows, said, noisy(80, seed=2)[1])
    tags = Tags(page("starter", report, comparison, STAGES, ("auroc: too low",)))
    for text in ("By language", "By category", "Against the reference", "auroc: too low", "0.950"):
        assert text in tags.text
    assert "script" not in tags.seen and "link" not in tags.seen
    # calibration, ROC and PR; three figures of three dimensions; two of categories; four stages
    assert len(images(tags)) == 3 + 9 + 2 + 4


def test_names_are_text_and_never_markup_or_mathematics() -> None:
    rows = [row(n, n % 2 == 0, ("S1",) if n % 2 == 0 else (), EVIL, EVIL, EVIL) for n in range(40)]
    said = scores([0.9 - n / 50 for n in range(40)])
    evil = Stages(losses={EVIL: [(0, 1.0)]}, sizes={EVIL: 1.0}, accuracy={EVIL: {EVIL: 1.0}})
    text = page(EVIL, evaluate(rows, said), compare(rows, said, said), evil, (EVIL,))
    tags = Tags(text)
    assert "script" not in tags.seen and EVIL in tags.text
    for image in images(tags):
        assert not list(image.iter("{http://www.w3.org/2000/svg}script"))


def test_rows_of_one_class_make_a_page_without_ranking_curves() -> None:
    rows = [row(n, False) for n in range(5)]
    tags = Tags(page("safe only", evaluate(rows, scores([0.1] * 5))))
    assert "ROC" not in tags.text.replace("AUROC", "") and "Calibration" in tags.text


def test_no_rows_and_nothing_given_still_make_a_page() -> None:
    assert "nothing" in Tags(page("nothing")).text
    assert "rows" in Tags(page("none", evaluate([], scores([])))).text


def test_same_figures_give_the_same_bytes() -> None:
    assert plots.sizes(STAGES.sizes) == plots.sizes(STAGES.sizes)
    assert plots.neurons(STAGES.neurons, 2) == plots.neurons(STAGES.neurons, 2)


def test_labels_of_plots_are_short_and_in_ascii() -> None:
    assert plots.label("a\nb\u202eс日") == "a?b???"
    assert len(plots.label("x" * 500)) == 40


def test_report_and_page_are_written_once(tmp_path: Path) -> None:
    rows, said = noisy(40)
    shown = write_report(tmp_path / "out", "t", evaluate(rows, said))
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["evaluation"]["all"]["rows"] == 40 and "comparison" not in found
    assert re.search("<title>t</title>", shown.read_text())
    with pytest.raises(FileExistsError):
        write_report(tmp_path / "out", "t", evaluate(rows, said))
