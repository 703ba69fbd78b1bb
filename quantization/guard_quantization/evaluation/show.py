"""A comparison for people, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guard_quantization.evaluation.markup import ends, number, title


def show_comparison(found: Mapping[str, Any]) -> None:
    """Figures side by side, then how far verdicts and scores are apart."""
    to = Console(highlight=False, markup=False)
    table = Table(box=box.SIMPLE)
    for column in ("", "reference", "other", "difference", "95 %"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, one in found["figures"].items():
        told = (number(one["reference"]), number(one["other"]), number(one["difference"], "+.4f"))
        table.add_row(title(name), *told, ends(one["interval"], "+.4f"))
    to.print(table)
    verdicts, moved = found["verdicts"], found["unsafe_score"]
    unjudged = found["unjudged"]
    to.print(
        f"{found['judged_by_both']} rows judged by both; without verdict: reference "
        f"{unjudged['reference']}, other {unjudged['other']}"
    )
    to.print(
        f"verdicts agree on {number(verdicts['agreement'], '.4f')} "
        f"{ends(verdicts['interval'], '.4f')}: {verdicts['to_unsafe']} became unsafe, "
        f"{verdicts['to_safe']} safe"
    )
    to.print(
        f"P(unsafe) differs by {number(moved['mean'], '.4f')} in the mean, "
        f"{number(moved['p99'], '.4f')} in 99 of 100 rows at most, {number(moved['max'], '.4f')} "
        "in all"
    )
    agreement = number(found["categories"]["agreement"], ".4f")
    to.print(f"the same category first in {agreement}")
