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


def train(
    checkpoint: Path,
    stop_at: int | None = None,
    accumulate: int = 1,
    rows: int = 3,
    drop: float = 0.3,
) -> tuple[Tensor, list[tuple[int, float]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    work = list(torch.randn(60, 4, generator=torch.Generator().manual_seed(1)).split(rows))

    def loss_of(x: Tensor) -> Tensor:
        if stop_at is not None and x is work[stop_at]:
            raise Interrupted
        return model(x).square().mean()  # type: ignore[no-any-return]

    curve = fit(
        model, optimizer, work, loss_of, what="test", checkpoint=checkpoint, warmup=2, every=5,
        accumulate=accumulate,
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), curve


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole, curve = train(tmp_path / "whole.pt")
    with pytest.raises(Interrupted):
        train(tmp_path / "broken.pt", stop_at=13)
    again, same = train(tmp_path / "broken.pt")
    assert torch.equal(again, whole)
    assert curve == same and len(curve) == 20 and curve[-1][0] == 20


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = train(tmp_path / "done.pt")
    assert torch.equal(train(tmp_path / "done.pt", stop_at=0)[0], first)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole.pt", rows=6, drop=0.0)
    parts, curve = train(tmp_path / "parts.pt", rows=3, accumulate=2, drop=0.0)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert curve[-1][0] == 10
