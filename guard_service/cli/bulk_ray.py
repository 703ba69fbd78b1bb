"""The blocks of a bulk run on a Ray cluster, by Ray Data.

Ray Data hands blocks to actors, each with a guard of its own, and hands them out again when a node
dies. Whoever does a block a second time finds it done, or writes it whole once more: how often that
happened is not to be seen in the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from guard_middleware.channel import TLS
from guard_service.cli.bulk_blocks import Block
from guard_service.cli.bulk_run import Halted
from guard_service.cli.bulk_shards import Shards, Work, judge_at
from guard_service.cli.place import Place
from guard_service.config import Settings
from guard_service.local import local_server

LOCAL = "local"  # a cluster of this machine alone, for this run


class BlockJudge:
    """An actor of Ray Data: a guard, or the way to one, and the blocks it is given.

    What ends a run is told in a row, not raised: Ray would bury it in what it says itself.
    """

    def __init__(self, work: Work, place: Place, cpus: int) -> None:
        self._work = work
        self._opened = ExitStack()
        self._wrong = ""
        try:
            target, tls = self._guard(place, cpus)
            self._judge = judge_at(target, tls, work.how)
        except Exception as wrong:
            self._wrong = f"a guard cannot start: {wrong}"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A block; gives back its number, and why the run cannot go on, if so."""
        block, wrong = Block(**row), self._wrong
        try:
            if not wrong:
                self._work.judge(block, self._judge)
        except (Halted, OSError) as why:
            wrong = str(why)
        return {"number": block.number, "wrong": wrong}

    def _guard(self, place: Place, cpus: int) -> tuple[str, TLS | None]:
        if place.address:
            return self._opened.enter_context(place.open())
        settings = Settings(
            model=place.model or "starter",
            policies=place.policies,
            threads=cpus,
            metrics=False,
            log_level="error",
        )
        return self._opened.enter_context(local_server(settings)), None


def judged(work: Work, todo: Sequence[Block], place: Place, shards: Shards) -> Iterator[Block]:
    """The blocks as they are done, in any order. Raises Halted when the run cannot go on."""
    _connect(shards.ray)
    # A row for each block, each a task: what a node had when it died is little. Ray Data starts
    # actors and tasks again, without end, that are lost with a node; not those that fail.
    rows = ray.data.from_items([asdict(block) for block in todo], override_num_blocks=len(todo))
    guards = max(1, int(ray.cluster_resources().get("CPU", 1)) // shards.cpus)
    done = rows.map(
        BlockJudge,
        fn_constructor_args=(work, place, shards.cpus),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=guards),
        num_cpus=shards.cpus,
    )
    by_number = {block.number: block for block in todo}
    try:
        for row in done.iter_rows():
            if row["wrong"]:
                raise Halted(row["wrong"])
            yield by_number[row["number"]]
    except ray.exceptions.RayError as broken:
        raise Halted(_reason(broken)) from None


def _connect(address: str) -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)


def _reason(broken: BaseException) -> str:
    """The last line that Ray says; what is before it is where in Ray it happened."""
    said = str(broken).strip().splitlines()
    return f"Ray: {said[-1] if said else type(broken).__name__}"
