"""The figures of `guardctl bench middleware` for people: one table, ratios first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guard_service.cli.bench_servers import BARE
from guard_service.cli.bench_streams import ENDS

# What stands in front, its title, and the figure of the bare backend.
_ROWS: tuple[tuple[str, str, str, str, str], ...] = (
    ("whole reply, p50", "added_p50_ms", "+{:.2f} ms", "p50_ms", "{:.2f} ms"),
    ("whole reply, p99", "added_p99_ms", "+{:.2f} ms", "p99_ms", "{:.2f} ms"),
    ("processor time of one", "added_cpu_ms", "+{:.2f} ms", "cpu_ms", "{:.2f} ms"),
    ("requests", "requests_per_s_ratio", "{:.2f}x", "requests_per_s", "{:.0f}/s"),
    ("stream at a model's pace", "paced_pieces_per_s_ratio", "{:.2f}x")
    + ("paced_pieces_per_s", "{:.0f}/s"),
    ("stream, all said at once", "pieces_per_s_ratio", "{:.2f}x", "pieces_per_s", "{:.0f}/s"),
    ("processor time of a piece", "added_cpu_us_per_piece", "+{:.0f} us")
    + ("cpu_us_per_piece", "{:.0f} us"),
    ("first text, all said at once", "added_first_ms", "+{:.1f} ms", "first_ms", "{:.1f} ms"),
    ("first text, a model's pace", "added_paced_first_ms", "+{:.1f} ms")
    + ("paced_first_ms", "{:.1f} ms"),
    ("route that is not guarded", "plain_p50_ms_ratio", "{:.2f}x", "plain_p50_ms", "{:.2f} ms"),
)


def show(report: Mapping[str, Any]) -> None:
    """The table, then what became of many streams."""
    everyone = report["variants"]
    to = Console(highlight=False, markup=False, width=max(80, 30 + 25 * len(everyone)))
    to.print(
        f"{report['cores']} cores; medians of {report['repeats']} turns; compared with the backend "
        f"alone in the same turn; pace: a piece every {report['paced_ms']} ms"
    )
    to.print(_table(everyone))
    for line in _streams(report):
        to.print(line, soft_wrap=True)


def _table(everyone: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for one in everyone:
        table.add_column(one["name"], justify="right")
    for title, key, form, own, own_form in _ROWS:
        cells = [
            _cell(one, own, own_form) if one["name"] == BARE else _cell(one, key, form)
            for one in everyone
        ]
        table.add_row(title, *cells)
    if BARE in {one["name"] for one in everyone if "streams" in one}:
        table.add_row("memory of an open stream", *map(_memory, everyone))
    return table


def _cell(one: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(one[key]).replace("+-", "-") if key in one else ""


def _memory(one: Mapping[str, Any]) -> str:
    if "streams" not in one:
        return ""
    key = "kib_per_stream" if one["name"] == BARE else "added_kib_per_stream"
    return f"{'' if one['name'] == BARE else '+'}{one['streams'][key]:.0f} KiB"


def _streams(report: Mapping[str, Any]) -> Iterator[str]:
    for one in report["variants"]:
        if streams := one.get("streams"):
            left = streams["left"]
            yield (
                f"{one['name']}: {_ends(streams)}; sockets left open {streams['sockets_left']}; "
                f"of clients that left, {left['told_to_backend']} told to the backend, sockets "
                f"left open {left['sockets_left']}"
            )
    if drain := report["drain"]:
        yield (
            f"sidecar told to end: {_ends(drain)}; it ended after {drain['seconds']:.1f} s with "
            f"exit code {drain['exit_code']}; open at the backend {drain['open_at_backend']}"
        )


def _ends(streams: Mapping[str, Any]) -> str:
    return "streams " + ", ".join(f"{end} {streams[end]}" for end in ENDS)
