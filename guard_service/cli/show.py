"""Verdicts for people: coloured on a terminal, plain elsewhere."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.text import Text

from guard_middleware.verdict import CategoryResult, ModelRef, PartCoverage, Verdict
from guard_policies.assessment import Action
from guard_service.cli.exits import printable

COLOURS = {Action.ALLOW: "green", Action.FLAG: "yellow", Action.BLOCK: "red"}
BAR_CELLS = 24
MOST_CATEGORIES = 5
LEAST_SCORE = 0.01


def console() -> Console:
    """Standard output; rich leaves colour out for NO_COLOR and where there is no terminal."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def as_json(value: Any) -> str:
    """One line of JSON from a dataclass of ours; actions and the like by their value."""
    return json.dumps(
        dataclasses.asdict(value), default=lambda odd: getattr(odd, "value", str(odd))
    )


def show_verdict(to: Console, verdict: Verdict, notice: str) -> None:
    """Action and score in one line, then the categories that matter, then what was not judged."""
    to.print(_headline(verdict))
    shown = sorted(verdict.categories, key=lambda category: -category.score)[:MOST_CATEGORIES]
    names = [c for c in shown if c.score >= LEAST_SCORE or c.fired]
    width = max((len(printable(f"{c.code} {c.name}")) for c in names), default=0)
    for category in names:
        to.print(_bar(category, width, unicode=to.encoding.lower().startswith("utf")))
    for line in coverage_lines(verdict):
        to.print(Text(f"  ! {line}", style="yellow"))
    if notice:
        to.print(Text(f"  {printable(notice)}", style="dim"))


def _headline(verdict: Verdict) -> Text:
    line = Text()
    line.append(verdict.action.value.upper(), style=f"bold {COLOURS[verdict.action]}")
    line.append(f"  unsafe {verdict.unsafe_score:.3f}")
    about = [
        f"the {verdict.direction.value}",
        f"policy {verdict.policy.name} {verdict.policy.version}".rstrip(),
        f"model {verdict.model.name}" + _tier(verdict.model),
        "from cache" if verdict.from_cache else f"{verdict.timing.total_s * 1000:.1f} ms",
    ]
    line.append("  " + ", ".join(map(printable, about)), style="dim")
    if verdict.shadow_action is not None:
        line.append(f"\n  ! shadow policy: would {verdict.shadow_action.value}", style="yellow")
    if verdict.joint:
        line.append("\n  no category reached its threshold alone; several did together")
    return line


def _tier(model: ModelRef) -> str:
    return f" ({model.tier} guard: {model.tier_reason})" if model.tier else ""


def _bar(category: CategoryResult, width: int, unicode: bool) -> Text:
    full, empty = ("█", "░") if unicode else ("#", ".")
    cells = round(min(1.0, category.score) * BAR_CELLS)
    style = COLOURS[category.action] if category.fired else ""
    line = Text("  ")
    line.append(printable(f"{category.code} {category.name}").ljust(width), style=style)
    line.append(f"  {category.score:.3f} ", style=style)
    line.append(full * cells, style=style)
    line.append(empty * (BAR_CELLS - cells), style="dim")
    if category.threshold <= 1:
        said = f" {category.action.value}" if category.fired else ""
        line.append(f"  at {category.threshold:g}{said}", style="dim")
    return line


def coverage_lines(verdict: Verdict) -> list[str]:
    """What a reader must know about what the verdict rests on; empty when all is as usual."""
    coverage = verdict.coverage
    lines = [_not_judged(part) for part in coverage.not_judged]
    if not coverage.complete and not lines:
        lines.append("not everything was judged")
    defused = sum(part.neutralised for part in coverage.parts)
    if defused:
        lines.append(f"{defused} template delimiters in the text were defused")
    spans = {(one.first_token, one.end_token) for one in coverage.windows}
    if len(spans) > 1:
        lines.append(
            f"{coverage.conversation_tokens} tokens judged in {len(spans)} windows; "
            "the worst counts"
        )
    images = {one.image_digest for one in coverage.windows}
    if len(images) > 1:
        lines.append(f"judged beside {len(images)} images or views of them; the worst counts")
    return lines


def _not_judged(part: PartCoverage) -> str:
    where = f"message {part.message_index + 1}, part {part.part_index + 1} ({part.kind})"
    return printable(f"NOT JUDGED: {where}: {part.reason}")
