"""A page of what stages recorded: costs, sizes, importance, loss, errors; then how well it judges.

The page is made of `stage.json` and of the evaluate stage's files alone, so that it can be made
anew at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from guard_quantization.evaluation import plots, report
from guard_quantization.evaluation.markup import (
    number,
    page,
    shown,
    table,
    title,
    whole,
    write_page,
)
from guard_quantization.evaluation.stage import COMPARISON, FITTED, REPORT, read
from guard_quantization.stages import RECORD

PAGE = "report.html"
_AGREEMENT = ("p_unsafe_difference", "verdict_agreement", "kl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")

Record = Mapping[str, Any]


def write_stages_page(
    path: Path, heading: str, folders: Mapping[str, Path], broken: Sequence[object] = ()
) -> None:
    """The page of the stages whose folders are there."""
    records = {name: found for name, folder in folders.items() if (found := read(folder, RECORD))}
    parts = [*report.broken_limits(broken), *_made(records)]
    if "evaluate" in records:
        parts += evaluated(folders["evaluate"])
    write_page(path, page(heading, parts))


def evaluated(folder: Path) -> Iterator[str]:
    """What an evaluate stage's folder holds."""
    sections: tuple[tuple[str, Callable[[Mapping[str, Any]], Iterator[str]]], ...] = (
        (REPORT, report.evaluation),
        (COMPARISON, report.comparison),
        (FITTED, report.fitted),
    )
    for name, section in sections:
        if found := read(folder, name):
            yield from section(found)


def _made(records: Mapping[str, Record]) -> Iterator[str]:
    made = {name: one for name, one in records.items() if "figures" in one}
    yield "<h2>Stages</h2>"
    yield table(
        ("stage", "seconds", "peak MiB"),
        ((name, whole(one["seconds"]), whole(one["peak_mib"])) for name, one in made.items()),
    )
    versions = {key: value for one in made.values() for key, value in one["versions"].items()}
    said = ", ".join(f"{key} {value}" for key, value in versions.items())
    yield f"<p><small>{escape(said)}</small></p>"
    figures = {name: one["figures"] for name, one in made.items()}
    if sizes := sizes_of(figures):
        yield shown([("Size after each step", plots.sizes(sizes))])
    for name, section in _SECTIONS.items():
        if name in figures:
            yield from section(figures[name])


def sizes_of(figures: Mapping[str, Record]) -> dict[str, float]:
    """MiB after each step; of an artifact, graph and weights without the tokenizer."""
    found = {step["step"]: step["mib"] for step in figures.get("prune", {}).get("steps", ())}
    if "quantize" in figures:
        if not found:
            found["source"] = figures["quantize"]["mib_before"]
        found["quantize"] = figures["quantize"]["mib"]
    if "export" in figures:
        files = figures["export"]["mib"].items()
        found["artifact"] = sum(mib for file, mib in files if file not in _TOKENIZERS)
    return found


def _pruned(found: Record) -> Iterator[str]:
    yield "<h3>Pruning: agreement with the whole model after each step</h3>"
    yield table(
        ("step", "parameters", "MiB", *map(title, _AGREEMENT)),
        (
            (
                title(step["step"]),
                whole(step["parameters"]),
                number(step["mib"], ",.1f"),
                *(number(step[name], ".4f") for name in _AGREEMENT),
            )
            for step in found["steps"]
        ),
    )
    images = []
    if blocks := found.get("blocks"):
        kept = found.get("kept_layers", range(len(blocks)))
        removed = sorted({*range(len(blocks))} - {*kept})
        images.append(("Blocks by importance", plots.blocks(blocks, removed)))
    if neurons := found.get("neurons"):
        before, after = found["sizes"]["intermediate_size"]
        drawn = plots.neurons(neurons["percentiles"], after / before)
        images.append(("Neurons by importance, a line for each layer", drawn))
    yield shown(images)


def _distilled(found: Record) -> Iterator[str]:
    yield f"<h3>Distillation: {found['examples']:,} examples</h3>"
    before, after = found["before"], found["after"]
    yield table(
        ("on rows that were held back", "before", "after"),
        ((title(name), number(before[name], ".4f"), number(after[name], ".4f")) for name in after),
    )
    yield shown([("Loss", plots.losses({"distill": found["curve"]}))] if found["curve"] else [])


def _quantized(found: Record) -> Iterator[str]:
    layers = found["layers"]
    yield "<h3>Quantization: relative error of each layer's outputs, mean of its matrices</h3>"
    errors = {
        kind: [_mean([one[kind] for one in layer["matrices"].values()]) for layer in layers]
        for kind in ("nearest", "error")
    }
    inputs = [_mean(list(layer["int8_inputs"].values())) for layer in layers]
    drawn = {"rounded to nearest": errors["nearest"], "as quantized": errors["error"]}
    if all(layer["int8_inputs"] for layer in layers):
        drawn["inputs in int8"] = inputs
    yield shown([("Errors by layer", plots.by_layer(drawn))])


def _exported(found: Record) -> Iterator[str]:
    yield f"<h3>The artifact: {found['parameters']:,} parameters</h3>"
    yield table(
        ("file", "MiB"), ((name, number(mib, ",.1f")) for name, mib in found["mib"].items())
    )


def _judged(found: Record) -> Iterator[str]:
    steps = found["accuracy"]
    if len(steps) > 1:
        yield "<h3>Figures step by step</h3>"
        names = list(dict.fromkeys(name for one in steps.values() for name in one))
        yield table(
            ("judge", *map(title, names)),
            ((step, *(number(one.get(name)) for name in names)) for step, one in steps.items()),
        )


_SECTIONS: Mapping[str, Callable[[Record], Iterator[str]]] = {
    "prune": _pruned,
    "distill": _distilled,
    "quantize": _quantized,
    "export": _exported,
    "evaluate": _judged,
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
