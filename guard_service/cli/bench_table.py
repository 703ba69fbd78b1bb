"""The figures of `guardctl bench engine` for people: one table, ratios first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guard_service.cli.exits import printable

_LABEL_WIDTH, _CELL_WIDTH = 26, 26


def show_figures(figures: Mapping[str, Any]) -> None:
    """The table, then what only our own engine has."""
    everyone = figures["contenders"]
    width = max(80, _LABEL_WIDTH + _CELL_WIDTH * len(everyone))
    to = Console(highlight=False, markup=False, width=width)
    for line in _head(figures):
        to.print(printable(line))
    to.print(_table(everyone))
    for line in _foot(figures):
        to.print(printable(line))


def _head(figures: Mapping[str, Any]) -> Iterator[str]:
    model = figures["model"]
    yield (
        f"{model['name']}  {model['parameters'] / 1e6:.1f} M parameters, {model['scheme']}, "
        f"template {model['template']}: {model['prefix_tokens']} tokens before a conversation, "
        f"{model['closing_tokens']} behind it"
    )
    yield (
        f"{figures['threads']} threads; median of {figures['repeats']} turns, \N{PLUS-MINUS SIGN} "
        "half of their range; x: how many times as long as ours takes"
    )
    if figures["left_out"]:
        lengths = ", ".join(map(str, figures["left_out"]))
        yield (
            f"left out: conversations of {lengths} tokens, beyond the model's window of "
            f"{model['window_tokens']}"
        )


def _table(everyone: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("prefix, tokens, verdict", no_wrap=True)
    for one in everyone:
        table.add_column(printable(one["name"]), justify="right", overflow="fold")
    by_name = [
        {(at["prefix"], at["tokens"], at["verdict"]): at for at in one["verdicts"]}
        for one in everyone
    ]
    for case in by_name[0]:
        prefix, tokens, verdict = case
        cells = [_cell(found.get(case), at > 0) for at, found in enumerate(by_name)]
        table.add_row(f"{prefix} {tokens:4d} {verdict}", *cells)
    for title, row in (
        ("prefill, tokens/s", [_number(one["prefill_tokens_per_s"], ".0f") for one in everyone]),
        ("cold start, s", [_starts(one["cold_starts"]) for one in everyone]),
        ("memory, MiB", [_number(one["rss_mib"], ".0f") for one in everyone]),
        ("memory at most, MiB", [_number(one["peak_mib"], ".0f") for one in everyone]),
    ):
        table.add_row(title, *row)
    return table


def _cell(found: Mapping[str, Any] | None, is_peer: bool) -> str:
    if found is None:
        return "-"
    took = f"{found['median_ms']:.1f} ms \N{PLUS-MINUS SIGN}{found['spread']:.0%}"
    return f"{found['times_ours']:.2f}x  {took}" if is_peer else took


def _starts(starts: Sequence[Mapping[str, float]]) -> str:
    """The first may fill the disk cache, or choose a kernel plan; the least is what it can be."""
    if not starts:
        return "-"
    totals = [start["total_s"] for start in starts]
    first = f"{totals[0]:.2f}"
    return first if len(totals) == 1 else f"{first}, then {min(totals[1:]):.2f}"


def _foot(figures: Mapping[str, Any]) -> Iterator[str]:
    for one in figures["contenders"]:
        if one["failure"]:
            yield f"! {one['name']} did not take part to the end: {one['failure']}"
    if stream := figures["stream"]:
        yield (
            f"streaming  {stream['rescan_times']:.1f}x faster than scanning anew: a reply of "
            f"{stream['reply_tokens']} tokens, {stream['checks']} checks, in "
            f"{stream['seconds']:.2f} s; {stream['tokens']} tokens computed, "
            f"{stream['tokens_of_reply_and_closings']:.2f}x those of the reply and the "
            f"{stream['closing_tokens']} of closings ({stream['share_of_allowed']:.0%} of what is "
            f"allowed); scores at most {stream['score_difference']:.1g} apart"
        )
    machine = figures["machine"]
    rates = machine["giga_multiply_adds_per_s"]
    yield (
        f"machine    {machine['prefill_share_of_int8']:.0%} of the int8 rate in prefill: "
        f"{machine['prefill_giga_multiply_adds_per_s']:.1f} billion multiply-adds/s, of int8 "
        f"{rates['int8']:.1f}, int4 {rates['int4']:.1f}, fp32 {rates['fp32']:.1f}; "
        f"{machine['mega_multiply_adds_per_token']:.1f} million a token"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
