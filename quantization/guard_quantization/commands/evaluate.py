"""guard-quantize evaluate, compare, thresholds: how well models judge labelled rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard_quantization.commands.options import (
    AsJson,
    Data,
    Probe,
    Split,
    Threads,
    Threshold,
    end_if_broken,
)

if TYPE_CHECKING:
    from guard_quantization.data import Row
    from guard_quantization.evaluation.plan import EvaluatePlan
    from guard_service.evaluation.scores import Scores

_MODEL = '"starter", an artifact folder (FOLDER@PLAN: by that kernel plan) or a checkpoint folder'
Model = Annotated[str, typer.Argument(help=f"Who judges: {_MODEL}.")]
Fpr = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Aim of the thresholds; none: the best F1."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep everything here: report.html, report.json, scores, thresholds.yaml. "
        "An interrupted evaluation goes on there.",
    ),
]


def evaluate(
    model: Model,
    data: Data,
    split: Split = "dev",
    threshold: Threshold = 0.5,
    probe: Probe = True,
    reference: Annotated[
        str, typer.Option(help=f"Compare with this one on the same rows: {_MODEL}.")
    ] = "",
    gate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Limits (YAML) that figures must keep."),
    ] = None,
    fit: Annotated[
        str, typer.Option(help="Split that temperatures and thresholds are fitted on; none: no.")
    ] = "dev",
    fpr: Fpr = None,
    out: Out = None,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Judge labelled rows: F1, FPR, AUROC, calibration and more, with 95 % intervals.

    By category, language, direction and source; beside a reference; held against limits, as
    `guardctl eval` does for any running guard. Ends with status 1 when a limit is broken.
    """
    from guard_quantization.evaluation.making import PAGE, write_stages_page
    from guard_quantization.evaluation.plan import EvaluatePlan
    from guard_quantization.evaluation.stage import REPORT, broken_limits, read
    from guard_service.evaluation.gate import read_limits
    from guard_service.evaluation.show import show_report

    limits = read_limits(gate.read_bytes(), str(gate)) if gate else None
    if limits and (limits.need_reference or limits.agreement) and not reference:
        raise ValueError("the limits compare with a reference: name it with --reference")
    plan = EvaluatePlan(
        split=split,
        probe=probe,
        threshold=threshold,
        fit=fit,
        fpr=fpr,
        reference=reference,
    )
    with _folder(out) as place:
        made = _evaluated(model, data, plan, place, threads)
        broken = broken_limits(made, limits) if limits else []
        report = read(made, REPORT) or {}
        write_stages_page(made / PAGE, model, {"evaluate": made}, broken)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        show_report(report)
        if out:
            typer.echo(f"see {out / PAGE}")
    end_if_broken(broken)


def compare(
    reference: Annotated[str, typer.Argument(help=f"{_MODEL}, or a file of guardctl's --scores.")],
    other: Annotated[str, typer.Argument(help="The same.")],
    data: Data,
    split: Split = "dev",
    threshold: Threshold = 0.5,
    probe: Annotated[
        bool, typer.Option(help="The packaged probe sets as well; not with files of scores.")
    ] = False,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Two models side by side on the same rows: differences with 95 % intervals, and agreement."""
    from guard_quantization.evaluation import compare as comparison
    from guard_quantization.evaluation.plan import EvaluatePlan
    from guard_quantization.evaluation.show import show_comparison
    from guard_quantization.evaluation.stage import choose_rows

    rows = choose_rows(_rows(data), EvaluatePlan(split=split, fit="", probe=probe)).rows
    said = [_scores(name, rows, threads) for name in (reference, other)]
    found = comparison.compare(rows, said[0], said[1], threshold)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show_comparison(found)


def thresholds(
    model: Annotated[str, typer.Argument(help=f"{_MODEL}, or a file of guardctl's --scores.")],
    data: Data,
    split: Split = "dev",
    fpr: Fpr = None,
    least_rows: Annotated[
        int, typer.Option(min=1, help="Rows of a class that a language needs for its own.")
    ] = 50,
    threads: Threads = 2,
) -> None:
    """Fit a threshold for each direction and language; printed as a piece of a policy."""
    from guard_quantization.evaluation.plan import EvaluatePlan
    from guard_quantization.evaluation.stage import choose_rows, fit_languages

    plan = EvaluatePlan(split=split, fit=split, fpr=fpr, least_rows=least_rows, probe=False)
    chosen = choose_rows(_rows(data), plan)
    made = fit_languages(chosen, _scores(model, chosen.rows, threads), plan)
    typer.echo(made["policy"], nl=False)


def _evaluated(model: str, data: Path, plan: EvaluatePlan, place: Path, threads: int) -> Path:
    """The stage's folder."""
    from guard_quantization.evaluation.judges import judge_digest, open_judge
    from guard_quantization.evaluation.stage import (
        MODEL,
        REFERENCE,
        choose_rows,
        evaluate_model,
    )
    from guard_quantization.stages import Origin, Run

    chosen = choose_rows(_rows(data), plan)
    names = {REFERENCE: plan.reference} if plan.reference else {}
    names[MODEL] = model
    judges = {name: partial(open_judge, one, threads=threads) for name, one in names.items()}
    inputs = {name: judge_digest(one) for name, one in names.items()}
    origin = Origin.of("evaluate", plan.measured(), {**inputs, "rows": chosen.digest})
    run = Run(place.parent, partial(typer.echo, err=True), {"evaluate": place.name})
    return run.stage(origin, lambda folder: evaluate_model(folder, plan, chosen, judges))


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where results are kept: `out`, or a place that is gone afterwards."""
    if out:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="guard-quantize-") as place:
        yield Path(place) / "evaluate"


def _rows(data: Path) -> list[Row]:
    from guard_quantization.data import read_rows
    from guard_service.evaluation.rows import data_files

    return read_rows(*data_files(data))


def _scores(name: str, rows: Sequence[Row], threads: int) -> Scores:
    """What a model says of rows, or what a file says that it said."""
    from guard_quantization.evaluation.evaluate import score_rows
    from guard_quantization.evaluation.judges import open_judge
    from guard_service.evaluation.scores import read_scores

    if Path(name).is_file():
        return read_scores(Path(name), rows)
    with closing(open_judge(name, threads=threads)) as judge:
        return score_rows(judge, rows, f"judge with {judge.card.name}")
