"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from guard_policies.positions import PolicyError
from guard_service.evaluation.gate import Limits, read_limits


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatePlan:
    """Which rows are judged, by whom besides the artifact, and what must come of it."""

    split: str = "dev"
    rows: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # of each file; empty: all
    probe: bool = True  # the packaged probe sets as well
    threshold: float = 0.5  # of P(unsafe), for figures
    fit: str = "dev"  # split that temperatures and thresholds are fitted on; "": none are
    fpr: float | None = None  # aim of the fitted thresholds; none: the best F1
    least_rows: int = 50  # of a class, for a language to have a threshold of its own
    reference: str = ""  # "source", or what `open_judge` takes; "": nobody
    steps: bool = False  # judge what each stage made, too
    limits: Mapping[str, Any] = field(default_factory=dict)  # see guard_service.evaluation.gate

    def __post_init__(self) -> None:
        for name in ("threshold", "fpr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"evaluate.{name} is {value}, must be 0 to 1")
        if self.least_rows < 1:
            raise ValueError("evaluate.least_rows must be above zero")
        limits = self.gate
        if limits and (limits.need_reference or limits.agreement) and not self.reference:
            raise ValueError("evaluate.limits compare with a reference: name evaluate.reference")

    @property
    def gate(self) -> Limits | None:
        """The limits, read; None for none. Raises ValueError naming every mistake."""
        if not self.limits:
            return None
        try:
            return read_limits(yaml.safe_dump(dict(self.limits)))
        except PolicyError as error:  # its lines are those of no file
            said = dict.fromkeys(problem.message for problem in error.problems)
            raise ValueError(f"evaluate.limits: {'; '.join(said)}") from error

    def measured(self) -> dict[str, Any]:
        """What the figures depend on: all but the limits."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "limits"}
