"""Which guard of a cascade decides, over real sockets, with both in one server."""

from __future__ import annotations

import pytest

from guard_api.v1 import verdict_pb2
from tests.service.asking import asked
from tests.service.cascade.guards import LARGE, SMALL, Told, says
from tests.service.conftest import RunGuard

BAND = """\
name: tiered
version: "1"
cascade:
  band: [0.25, 0.75]
"""


async def test_the_second_decides_in_the_band_and_the_verdict_says_so(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE)
    guard = await run_guard(small, (BAND,), second=large)
    told = []
    for text in (says(0.1, 0.9), says(0.3, 0.9), says(0.6, 0.2), says(0.9, 0.1)):
        verdict = (await guard.stub.Classify(asked(text, policy="tiered"))).verdict
        model = verdict.model
        action = verdict_pb2.Action.Name(verdict.action).removeprefix("ACTION_")
        told.append((action, verdict.unsafe_score, model.name, model.tier, model.tier_reason))
    assert told == [
        ("ALLOW", pytest.approx(0.1), SMALL, "first", "OUTSIDE_BAND"),
        ("BLOCK", pytest.approx(0.9), LARGE, "second", "IN_BAND"),
        ("ALLOW", pytest.approx(0.2), LARGE, "second", "IN_BAND"),
        ("BLOCK", pytest.approx(0.9), SMALL, "first", "OUTSIDE_BAND"),
    ]
