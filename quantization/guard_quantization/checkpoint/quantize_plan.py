"""How a checkpoint is to be quantized, and the calibration rows it is done by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guard_quantization.export.decoder import ExportError, Shape


class QuantizeError(ExportError):
    """A plan or calibration rows that do not go with the checkpoint; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """How the matrices of a checkpoint are rounded."""

    bits: int = 4
    block: int = 128  # input channels that share a scale
    embedding_bits: int = 4  # 32 leaves the table as it is; 8 takes one scale for each token
    method: str = "gptq"  # or "nearest", which needs no rows but measures its errors on them
    rotate: bool = False
    rows: int = 128  # calibration rows, the first of those that are given
    tokens: int = 1024  # of a row; longer rows lose what follows their first token
    seed: int = 0  # of the rotations
    damping: float = 0.01  # share of the mean of the Hessian's diagonal that is added to it

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bits", (4, 8)),
            ("block", (32, 64, 128, 256)),
            ("embedding_bits", (4, 8, 32)),
            ("method", ("gptq", "nearest")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise QuantizeError(f"quantize.{name} is {getattr(self, name)}, must be {choices}")
        for name, sound in (
            ("rows", self.rows >= (self.method == "gptq")),
            ("tokens", self.tokens >= 2),
            ("seed", self.seed >= 0),
            ("damping", 0 < self.damping <= 1),
        ):
            if not sound:
                raise QuantizeError(f"quantize.{name} is {getattr(self, name)}: out of range")

    def check(self, shape: Shape) -> None:
        """Raises QuantizeError for a block that does not go with a checkpoint."""
        if self.embedding_bits == 4 and shape.hidden % self.block:
            raise QuantizeError(
                f"quantize.block is {self.block}, the width {shape.hidden} is no multiple of it; "
                "take a smaller block or quantize.embedding_bits of 8"
            )


def select_rows(
    plan: QuantizePlan, calibration: Sequence[Sequence[int]], vocab: int
) -> list[Sequence[int]]:
    """The rows to go by, cut to `plan.tokens`. Raises QuantizeError."""
    found: list[Sequence[int]] = []
    for at, row in enumerate(calibration[: plan.rows]):
        if not row or not all(0 <= token < vocab for token in row):
            raise QuantizeError(f"calibration row {at} is empty or has tokens beyond {vocab - 1}")
        long = len(row) > plan.tokens
        found.append([row[0], *row[1 - plan.tokens :]] if long else list(row))
    if plan.method == "gptq" and not found:
        raise QuantizeError("quantize.method gptq needs calibration rows; nearest does without")
    return found
