"""The training loop that teacher and student share: batches, schedule, progress, checkpoints."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

T = TypeVar("T")


def batches(items: Sequence[T], lengths: Sequence[int], tokens: int, seed: int) -> list[list[T]]:
    """Batches of at most `tokens` padded tokens, similar lengths together, in random order."""
    rng = random.Random(seed)
    order = sorted(range(len(items)), key=lambda i: lengths[i] + rng.random() * 4)
    made: list[list[T]] = []
    current: list[T] = []
    for i in order:
        if current and lengths[i] * (len(current) + 1) > tokens:
            made.append(current)
            current = []
        current.append(items[i])
    if current:
        made.append(current)
    rng.shuffle(made)
    return made


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Report:
    """Progress of a run: a bar on a terminal, a line every `every_s` seconds elsewhere."""

    def __init__(self, what: str, steps: int, every_s: float = 30.0) -> None:
        self._what, self._steps, self._every_s = what, steps, every_s
        self._began = self._spoke = time.monotonic()
        self._first: int | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=steps, note="")
            self._bar.start()

    def at(self, step: int, note: str) -> None:
        """Show that `step` of all steps are done."""
        now = time.monotonic()
        self._first = step - 1 if self._first is None else self._first
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        elif now - self._spoke >= self._every_s or step == self._steps:
            pace = (now - self._began) / max(1, step - self._first)
            left = pace * (self._steps - step) / 60
            print(
                f"{self._what}: {step}/{self._steps} {note}, {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
            self._spoke = now

    def close(self) -> None:
        """Stop the bar."""
        if self._bar:
            self._bar.stop()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    work: Sequence[T],
    loss_of: Callable[[T], Tensor],
    *,
    what: str,
    checkpoint: Path,
    warmup: int = 200,
    every: int = 500,
    clip: float = 1.0,
    accumulate: int = 1,
    around: Callable[[int, int], AbstractContextManager[None]] = lambda step, steps: nullcontext(),
) -> list[tuple[int, float]]:
    """One optimizer step per `accumulate` elements of `work`; goes on from `checkpoint` if it can.

    `around` gives the context in which loss and gradient are computed, for the step and how many
    there are. Returns the curve of the loss: (step, mean loss since the point before), about a
    hundred points.

    `work` must be the same sequence on every call: the checkpoint remembers how many steps are
    done. Ctrl-C leaves the last checkpoint behind.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    steps = math.ceil(len(work) / accumulate)
    done, curve, lately = _resume(model, optimizer, checkpoint)
    report = Report(what, steps)
    model.train()
    try:
        for step in range(done, steps):
            factor = warmup_cosine(step, steps, warmup)
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=True)
            parts = work[step * accumulate : (step + 1) * accumulate]
            with around(step, steps):
                lately.append(sum(_backward(loss_of(part) / len(parts)) for part in parts))
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            mean = sum(lately) / len(lately)
            report.at(step + 1, f"loss {mean:.4f}")
            last = step + 1 == steps
            if (step + 1) % max(1, steps // 100) == 0 or last:
                curve.append((step + 1, mean))
                lately.clear()
            if (step + 1) % every == 0 or last:
                told = {"step": step + 1, "curve": curve, "lately": lately}
                save(checkpoint, {**told, **_state(model, optimizer)})
    finally:
        report.close()
    model.eval()
    return curve


def _backward(loss: Tensor) -> float:
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.item())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> tuple[int, list[tuple[int, float]], list[float]]:
    if not checkpoint.exists():
        return 0, [], []
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), state.get("curve", []), state.get("lately", [])


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that an interruption never leaves half of one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        torch.save(state, partial)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"{partial} cannot be written; make room, then run this again") from error
    partial.replace(path)
