"""The training loop: batches, schedule, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from guard_quantization.training import batches, fit, warmup_cosine


def test_batches_hold_every_item_once_within_the_budget() -> None:
    lengths = [(n * 7) % 40 + 1 for n in range(200)]
    made = batches(range(200), lengths, 120, seed=1)
    assert sorted(item for batch in made for item in batch) == list(range(200))
    assert all(
        max(lengths[i] for i in batch) * len(batch) <= 120 + 4 * len(batch) for batch in made
    )


def test_an_item_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert [5] in batches(range(6), [1, 1, 1, 1, 1, 500], 100, seed=0)


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


class Interrupted(Exception):
    """What a test raises in place of Ctrl-C."""


def train(checkpoint: Path, stop_at: int | None = None) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    work = [torch.randn(3, 4) for _ in range(20)]

    def loss_of(x: Tensor) -> Tensor:
        if stop_at is not None and x is work[stop_at]:
            raise Interrupted
        return model(x).square().mean()  # type: ignore[no-any-return]

    fit(model, optimizer, work, loss_of, what="test", checkpoint=checkpoint, warmup=2, every=5)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole.pt")
    with pytest.raises(Interrupted):
        train(tmp_path / "broken.pt", stop_at=13)
    assert torch.equal(train(tmp_path / "broken.pt"), whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path / "done.pt")
    assert torch.equal(train(tmp_path / "done.pt", stop_at=0), first)
