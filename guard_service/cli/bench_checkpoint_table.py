"""The figures of a checkpoint for people: two tables, what caches save in the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guard_service.cli.exits import printable

_WIDTH = 140
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def show_checkpoint(figures: Mapping[str, Any]) -> None:
    """Cases, then batches, memory and the device."""
    to = Console(highlight=False, markup=False, width=_WIDTH)
    for line in _head(figures):
        to.print(printable(line))
    to.print(_cases(figures))
    for line in _foot(figures):
        to.print(printable(line))


def _head(figures: Mapping[str, Any]) -> Iterator[str]:
    model = figures["model"]
    yield (
        f"{model['name']}  {model['parameters'] / 1e6:,.1f} M parameters, {model['held']}, "
        f"template {model['template']}, on {figures['device']}"
    )
    if model["notice"]:
        yield f"{model['notice']}"
    yield (
        f"{figures['threads']} threads; median of {figures['repeats']} turns, {_PLUS_MINUS} half "
        "of their range; x: how many times as long as ours takes with what it has kept"
    )


def _cases(figures: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("case", no_wrap=True)
    for title in (
        "ours",
        "tokens computed, kept",
        "nothing kept",
        "tokens",
        "generate safe, unsafe",
        "of matrix rate, bandwidth",
    ):
        table.add_column(title, justify="right")
    for one in figures["cases"]:
        times = one["times"]
        table.add_row(
            one["case"],
            f"{times['kept']['median_ms']:,.1f} ms {_PLUS_MINUS}{times['kept']['spread']:.0%}",
            f"{one['computed_tokens']}, {one['kept_tokens']}",
            f"{times['bare']['times_ours']:.2f}x",
            str(one["computed_without_caches"]),
            f"{times['generate safe']['times_ours']:.2f}x, "
            f"{times['generate unsafe']['times_ours']:.2f}x",
            f"{one['share_of_matrix_rate']:.1%}, {one['share_of_bandwidth']:.1%}",
        )
    return table


def _foot(figures: Mapping[str, Any]) -> Iterator[str]:
    kinds: dict[str, list[str]] = {}
    for one in figures["batches"]:
        shown = f"{one['size']}: {one['verdicts_per_s']:,.2f}/s"
        kinds.setdefault(one["prompts"], []).append(shown)
    for kind, rates in kinds.items():
        yield f"batches    {kind}, of {'  '.join(rates)}"
    memory = figures["memory"]
    yield (
        f"memory     {memory['loaded_mib']:,.0f} MiB loaded, {memory['rss_mib']:,.0f} at the end, "
        f"{memory['peak_mib']:,.0f} at most, generate's included; images kept: "
        f"{memory['image_cache_mib']:,.1f} MiB"
    )
    if "cuda_peak_mib" in memory:
        yield (
            f"GPU memory {memory['cuda_peak_mib']:,.0f} MiB at most, "
            f"{memory['cuda_reserved_mib']:,.0f} reserved"
        )
    yield f"start      loaded in {figures['load_s']:.1f} s, ready in {figures['ready_s']:.1f} s"
    rates = figures["rates"]
    yield (
        f"device     matrix products {rates['tflops']:,.2f} TFLOP/s, copies "
        f"{rates['gb_per_s']:,.1f} GB/s, both measured just now in the model's number type"
    )
