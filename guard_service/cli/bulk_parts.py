"""The output of a sharded run: a folder with a file for each block, whole or not there."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from guard_service.cli.bulk_blocks import Block, Plan
from guard_service.cli.bulk_output import NotResumable

PLAN, SUMMARY, LOCK = "plan.json", "summary.json", ".lock"


@dataclass(slots=True)
class Count:
    """What the finished parts hold, counted line by line."""

    lines_in: int = 0
    lines_out: int = 0
    twice: int = 0
    missing: int = 0
    errors: int = 0

    @property
    def whole(self) -> bool:
        """Whether each line in has exactly one line out."""
        return self.lines_in == self.lines_out and not self.twice and not self.missing


class Parts:
    """The folder of one run; several processes may write into it, each block as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, block: Block) -> Path:
        """Where the block's lines go."""
        return self.folder / f"part-{block.number:06}.jsonl"

    def is_done(self, block: Block) -> bool:
        """Whether its lines are there."""
        return self.path(block).exists()

    def write(self, block: Block, lines: Iterable[bytes]) -> None:
        """Write a block's lines; they are seen when the last one is on the disk. Of two writers of
        the same block the later one's stay."""
        making = self.folder / f".{self.path(block).name}.{uuid.uuid4().hex}"
        try:
            with making.open("xb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            making.replace(self.path(block))
        finally:
            making.unlink(missing_ok=True)

    @contextmanager
    def opened(self, plan: Plan, restart: bool) -> Iterator[list[Block]]:
        """The blocks still to do. Raises NotResumable where the folder is another run's."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise NotResumable("another run is writing to it") from None
            self._begin(plan, restart)
            yield [block for block in plan.blocks if not self.is_done(block)]

    def _begin(self, plan: Plan, restart: bool) -> None:
        kept = self.folder / PLAN
        ours = [*self.folder.glob("part-*.jsonl"), *self.folder.glob(".part-*"), kept]
        others = {path.name for path in self.folder.iterdir()} - {one.name for one in ours}
        if others - {SUMMARY, LOCK}:
            raise NotResumable("it holds files that are not of a bulk run")
        if restart:
            for path in (*ours, self.folder / SUMMARY):
                path.unlink(missing_ok=True)
        if not kept.exists():
            if any(self.folder.glob("part-*.jsonl")):
                raise NotResumable("its plan is not there")
            kept.write_text(plan.text())
        elif kept.read_text() != plan.text():
            raise NotResumable("its plan is of other inputs, or of blocks of another size")

    def finish(self, plan: Plan) -> Count:
        """Count every line of every part, note it in the folder, remove what dead writers left.

        Raises NotResumable where models or policies of lines differ.
        """
        count = Count(lines_in=plan.records)
        stamps: set[tuple[str, str, bool]] = set()
        for block in plan.blocks:
            self._count(block, count, stamps)
        policies = {policy for policy, _, _ in stamps}
        models = {model for _, model, tiered in stamps if not tiered}
        (self.folder / SUMMARY).write_text(json.dumps(asdict(count), indent=1) + "\n")
        for left in self.folder.glob(".part-*"):
            left.unlink(missing_ok=True)
        if len(policies) > 1 or len(models) > 1:
            raise NotResumable("its lines were judged by more than one model or policy")
        return count

    def _count(self, block: Block, count: Count, stamps: set[tuple[str, str, bool]]) -> None:
        places = set()
        with self.path(block).open("rb") as file:
            for raw in file:
                found = json.loads(raw)
                count.lines_out += 1
                count.errors += found["error"] is not None
                if found["error"] is None:
                    tiered = bool(found.get("tier"))
                    stamps.add((found["policy_digest"], found["model_digest"], tiered))
                place = found["line"]
                within = block.first <= place < block.first + block.lines
                if place in places or not within:
                    count.twice += 1
                places.add(place)
        count.missing += max(0, block.records - len(places))
