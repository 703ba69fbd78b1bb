"""A short run of `make chaos`: real processes, a guard that is killed and one that hangs."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.report import markdown
from tests.chaos.run import Plan, run

NEVER = ("lost", "leaked", "unscreened", "wrong", "unrecorded", "mixed", "tracebacks")
# "unexplained" and "grown" depend on how fast the machine is: they count in `make chaos` alone.


def test_nothing_is_lost_leaked_unscreened_or_mixed_while_guards_die_and_hang(
    tmp_path: Path,
) -> None:
    plan = Plan(2.0, seed=1, callers=2, clients=3, names=("guard killed", "guard hangs"))
    done = run(plan, tmp_path)
    happened = {name: done.ledger.wrongs[name] for name in NEVER}  # type: ignore[index]
    assert not any(happened.values()), markdown(done)
    assert done.faults.counts == {"guard killed": 1, "guard hangs": 1}
    results = {result for _, result in done.ledger.ended}
    assert {"verdict", "passed", "refused"} <= results and done.ledger.verdicts
    assert {one.name for one in done.processes if one.starts == 2} == {"guard-1"}
