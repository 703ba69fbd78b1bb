"""A fitted band, served: both guards' behaviour is known, and so is what the cascade must do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.evaluation.cascade import Point, fit_band
from guard_service.evaluation.figures import Bools, Floats
from tests.service.asking import Running, asked
from tests.service.cascade.guards import LARGE, SMALL, Told, says
from tests.service.conftest import RunGuard


@dataclass(frozen=True)
class Rows:
    """Labelled rows: of a third of them the small guard is unsure, of few the large one is."""

    labels: Bools
    small: Floats
    large: Floats

    @classmethod
    def drawn(cls, count: int, seed: int) -> Rows:
        rng = np.random.default_rng(seed)
        labels = rng.random(count) < 0.4
        centre = np.where(labels, 1.0, -1.0)

        def scores(distance: float) -> Floats:
            found: Floats = 1 / (1 + np.exp(-rng.normal(distance * centre, 1.5)))
            return np.round(found, 4)

        return cls(labels, scores(1.5), scores(4.0))

    def point(self, band: tuple[float, float] | None) -> Point:
        """What a band makes of these rows, reckoned without a server."""
        inside = np.zeros(len(self.labels), bool)
        if band is not None:
            inside = (band[0] <= self.small) & (self.small <= band[1])
        fired = np.where(inside, self.large, self.small) >= 0.5
        return Point(
            band,
            sent=float(inside.mean()),
            recall=float(fired[self.labels].mean()),
            fpr=float(fired[~self.labels].mean()),
            agreement=float((fired == (self.large >= 0.5)).mean()),
        )


async def verdicts(guard: Running, rows: Rows) -> list[verdict_pb2.Verdict]:
    texts = [says(small, large) for small, large in zip(rows.small, rows.large, strict=True)]
    request = guard_pb2.ClassifyBatchRequest(
        requests=[asked(text, policy="tiered") for text in texts]
    )
    return [one.verdict for one in (await guard.stub.ClassifyBatch(request)).results]


async def test_a_fitted_band_serves_as_it_was_reckoned_on_rows_it_has_not_seen(
    run_guard: RunGuard,
) -> None:
    dev, held_out = Rows.drawn(2_000, seed=1), Rows.drawn(200, seed=2)
    fit = fit_band(dev.labels, dev.small, dev.small >= 0.5, dev.large >= 0.5, tolerance=0.01)
    assert fit.chosen.band is not None
    low, high = fit.chosen.band
    policy = f"name: tiered\nversion: '1'\ncascade: {{band: [{low}, {high}]}}\n"
    large = Told(LARGE)
    guard = await run_guard(Told(SMALL), (policy,), second=large)

    found = await verdicts(guard, held_out)
    fired = np.array([one.action == verdict_pb2.ACTION_BLOCK for one in found])
    sent = np.array([one.model.tier == "second" for one in found])
    labels = held_out.labels
    served = Point(
        fit.chosen.band,
        sent=float(sent.mean()),
        recall=float(fired[labels].mean()),
        fpr=float(fired[~labels].mean()),
        agreement=float((fired == (held_out.large >= 0.5)).mean()),
    )
    assert served == held_out.point(fit.chosen.band)
    assert sum(f"{LARGE}=" in text for batch in large.batches for text in batch) == sent.sum()

    first, second = held_out.point(None), held_out.point((0.0, 1.0))
    assert first.recall + 0.05 < served.recall and served.fpr < first.fpr - 0.05
    assert abs(served.recall - second.recall) < 0.05 and abs(served.fpr - second.fpr) < 0.05
    assert served.agreement > 0.95 and 0.2 < served.sent < 0.6
