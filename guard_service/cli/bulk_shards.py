"""What `guardctl bulk` does with a folder, a Parquet file, or on Ray: it judges block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from guard_middleware.channel import TLS
from guard_middleware.client import GuardClient
from guard_middleware.retry import Retries
from guard_middleware.terms import Terms
from guard_middleware.verdict import Verdict
from guard_service.cli import exits, progress
from guard_service.cli.bulk_blocks import BadInput, Block, plan_of, records_of
from guard_service.cli.bulk_lines import Record, error_line, verdict_line
from guard_service.cli.bulk_output import NotResumable
from guard_service.cli.bulk_parts import Parts
from guard_service.cli.bulk_run import Halted, How, Judge, say
from guard_service.cli.place import Place


@dataclass(frozen=True, slots=True)
class Shards:
    """How to run in blocks. `ray` is the address of a cluster; without it the blocks are judged
    here, one after another. `cpus` are those of one guard on the cluster."""

    block_lines: int
    ray: str = ""
    cpus: int = 2


@dataclass(frozen=True, slots=True)
class Work:
    """All that judging a block needs; goes to other machines, where the paths must be the same."""

    source: Path
    result: Path
    how: How

    def judge(self, block: Block, judge: Judge) -> None:
        """Judge a block's records and write its lines; one that is there already is kept."""
        parts = Parts(self.result)
        if parts.is_done(block):
            return

        def line(record: Record) -> bytes:
            found = judge(record)
            if isinstance(found, Verdict):
                return verdict_line(record, found)
            return error_line(record, found)

        with ThreadPoolExecutor(judge.threads, thread_name_prefix="bulk") as pool:
            parts.write(block, pool.map(line, records_of(self.source, block)))


def run(source: Path, result: Path, place: Place, how: How, shards: Shards) -> int:
    """Judge every line of the inputs, each block once; the exit code."""
    if not source.exists():
        exits.fail(f"there is no file or folder {source}", exits.USAGE)
    if result.exists() and not result.is_dir():
        exits.fail("OUT must be a folder, for a file for each block", exits.USAGE)
    source, result = source.absolute(), result.absolute()
    parts, work = Parts(result), Work(source, result, how)
    try:
        plan = plan_of(source, shards.block_lines)
        with ExitStack() as stack:
            todo = stack.enter_context(parts.opened(plan, how.restart))
            if len(todo) < len(plan.blocks):
                say(
                    f"{len(plan.blocks) - len(todo)} of {len(plan.blocks)} blocks are there already"
                )
            told = stack.enter_context(progress.shown(len(plan.blocks)))
            done = sum(block.records for block in set(plan.blocks) - set(todo))
            blocks = len(plan.blocks) - len(todo)
            for block in _judged(work, todo, place, shards):
                done, blocks = done + block.records, blocks + 1
                told(done, 0, blocks)
            count = parts.finish(plan)
    except BadInput as wrong:
        exits.fail(str(wrong), exits.USAGE)
    except NotResumable as why:
        exits.fail(f"cannot go on with {result.name}: {why}; --restart writes it anew", exits.USAGE)
    except KeyboardInterrupt:
        say("interrupted; the same command again goes on with the blocks that are not there")
        return exits.INTERRUPTED
    except Halted as why:
        say(f"stopped: {why}; the same command again goes on with the blocks that are not there")
        return exits.UNFINISHED
    except OSError as why:
        exits.fail(f"cannot read or write: {why}")
    say(
        f"{count.lines_in} lines in, {count.lines_out} out, {count.twice} twice, "
        f"{count.missing} missing, {count.errors} with an error"
    )
    if not count.whole:
        return exits.UNFINISHED
    return exits.NO_VERDICT if count.errors else exits.OK


def _judged(work: Work, todo: Sequence[Block], place: Place, shards: Shards) -> Iterator[Block]:
    if not todo:
        return
    if shards.ray:
        from guard_service.cli import bulk_ray  # heavy, and an extra

        yield from bulk_ray.judged(work, todo, place, shards)
        return
    with place.open(apart=True) as (target, tls):
        judge = judge_at(target, tls, work.how)
        try:
            for block in todo:
                work.judge(block, judge)
                yield block
        finally:
            judge.stop()


def judge_at(target: str, tls: TLS | None, how: How) -> Judge:
    """Who asks the guard there."""
    terms = Terms(timeout_s=how.timeout_s, tls=tls, retries=Retries(attempts=1))
    return Judge(GuardClient(target, terms), how)
