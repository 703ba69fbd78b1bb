"""The sums of deploy/SIZING.md, done again from the figures that it rests on."""

from __future__ import annotations

import re

from tests.deploy.manifests import ROOT

PAGE = (ROOT / "deploy" / "SIZING.md").read_text()
README = (ROOT / "README.md").read_text()
SECONDS = {"starter": 0.0063, "official": 2 * 0.123, "compact": 2 * 0.079}  # of a core, a verdict
GPU_RATE, GPU_PRICE, CORE_PRICE, USED = 284, 4.00, 0.04, 0.5
BYTES = 174 + 902


def row(beginning: str, column: int = 0) -> list[float]:
    """The numbers of the table row that begins so, from a column on."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {beginning}"))
    cells = line.split("|")[2 + column :]
    return [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*\.?\d*", "|".join(cells))]


def cost(seconds: float) -> tuple[float, float, float]:
    hours = 1e6 * seconds / 3600
    return hours, hours / USED, hours / USED * CORE_PRICE


def test_a_verdict_is_what_was_measured() -> None:
    assert "| ours, by plan int8 | 123 and 121 ms | 79 and 94 ms |" in README
    assert "284/s" in README
    assert row("starter | 0")[:2] == [0.0063, round(1 / SECONDS["starter"])]
    assert (
        row("published size")[:2]
        == [0.246, 4.1]
        == [
            round(SECONDS["official"], 3),
            round(1 / SECONDS["official"], 1),
        ]
    )
    assert row("the same, compact")[:2] == [0.158, round(1 / SECONDS["compact"], 1)]


def test_a_million_verdicts_cost_what_the_formula_says() -> None:
    for beginning, name in (
        ("starter | 1.75", "starter"),
        ("1B, official", "official"),
        ("1B, compact", "compact"),
    ):
        hours, with_u, price = cost(SECONDS[name])
        found = row(beginning)
        assert abs(found[0] - hours) < 0.06 and abs(found[1] - with_u) < 0.06
        assert found[2] == round(price, 2)
    gpu_hours = 1e6 / GPU_RATE / 3600
    on_gpu = gpu_hours / USED * GPU_PRICE
    assert row("11B Vision on an H200 (paper)") == [
        round(gpu_hours, 2),
        round(gpu_hours / USED, 2),
        round(on_gpu, 2),
    ]
    assert row("cascade")[-1] == round(cost(SECONDS["compact"])[2] + 0.05 * on_gpu, 2)


def test_a_thousand_times_more_is_a_thousand_times_more() -> None:
    rate = 1000 * 2 / SECONDS["compact"] * USED
    assert f"{round(rate):,} a second, {round(rate * 86_400 / 1e6)} million a day" in PAGE
    cores = rate * SECONDS["compact"] / USED
    assert row("cores")[:3] == [round(cores), 250, 8] and round(cores) == 250 * 8
    assert row("GPUs")[0] == -(-rate // (GPU_RATE * USED))
    assert row("network")[0] == round(rate * BYTES * 8 / 1e6)
    assert -(-(0.05 * rate) // (GPU_RATE * USED)) == 3
