"""What `guardctl bulk` does: a window of calls in flight, answers written in order."""

from __future__ import annotations

import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from guard_middleware.client import GuardClient
from guard_middleware.errors import (
    GuardError,
    NotPermitted,
    NotSupported,
    Overloaded,
    Unavailable,
    UnknownPolicy,
)
from guard_middleware.retry import Retries
from guard_middleware.terms import Terms
from guard_middleware.verdict import Verdict
from guard_service.cli import exits, progress
from guard_service.cli.bulk_lines import (
    Record,
    error_line,
    read_records,
    same_judge,
    stamp,
    verdict_line,
)
from guard_service.cli.bulk_output import Done, NotResumable, Output, open_input, open_output
from guard_service.cli.pace import Pace
from guard_service.cli.place import Place

FLUSH_EVERY_S = 1.0
# Lines that wait behind a slow one, so that the places do not stand empty.
WINDOW_PER_PLACE = 4


@dataclass(frozen=True, slots=True)
class How:
    """How to run: times in seconds."""

    policy: str
    language: str
    concurrency: int
    patience_s: float
    timeout_s: float
    restart: bool


class Halted(Exception):
    """The run cannot go on, through no fault of a line."""


def run(source: Path, result: Path, place: Place, how: How) -> int:
    """Judge every line of `source`, go on where `result` ends; the exit code."""
    _check_paths(source, result)
    done = Done()
    try:
        with ExitStack() as stack:
            stream, tell, size = stack.enter_context(open_input(source))
            records = read_records(stream)
            output, done = stack.enter_context(open_output(result, records, how.restart))
            if done.lines:
                say(f"{done.lines} lines are in {result.name} already; going on behind them")
            target, tls = stack.enter_context(place.open(apart=True))
            terms = Terms(
                timeout_s=how.timeout_s,
                tls=tls,
                token=place.token,
                retries=Retries(attempts=1),
            )
            judge = Judge(GuardClient(target, terms), how)
            told = stack.enter_context(progress.shown(size))
            _write_all(judge, records, output, done, lambda: told(done.lines, done.errors, tell()))
    except NotResumable as why:
        exits.fail(f"cannot go on with {result.name}: {why}; --restart writes it anew", exits.USAGE)
    except KeyboardInterrupt:
        say(f"interrupted after {done.lines} lines; the same command again goes on from there")
        return exits.INTERRUPTED
    except Halted as why:
        say(f"stopped after {done.lines} lines: {why}; the same command again goes on from there")
        return exits.UNFINISHED
    except OSError as why:
        exits.fail(f"cannot read or write: {why}")
    say(f"{done.lines} lines judged, {done.errors} with an error")
    return exits.NO_VERDICT if done.errors else exits.OK


class Judge:
    """Asks for one record at a time, from many threads; waits where the guard is full or away."""

    def __init__(self, guard: GuardClient, how: How) -> None:
        self._guard = guard
        self._how = how
        self._pace = Pace(how.concurrency, how.patience_s)
        self.window = how.concurrency * WINDOW_PER_PLACE
        self.threads = how.concurrency

    def __call__(self, record: Record) -> Verdict | GuardError | None:
        """The verdict, the record's own error, or None when the line itself is wrong.

        Raises Halted for what would meet every record, Stopped after `stop`.
        """
        if record.conversation is None:
            return None
        while True:
            try:
                with self._pace.place():
                    return self._ask(record)
            except (Overloaded, Unavailable) as error:
                if not self._pace.turned_away(error.retry_after_s):
                    raise Halted(str(error)) from None

    def stop(self) -> None:
        """Give up all calls, those under way too."""
        self._pace.stop()
        self._guard.close()

    def _ask(self, record: Record) -> Verdict | GuardError:
        assert record.conversation is not None
        try:
            verdict = self._guard.classify(
                record.conversation,
                policy=self._how.policy,
                language=record.language or self._how.language,
            )
        except (Overloaded, Unavailable):
            raise
        except (NotPermitted, UnknownPolicy) as error:
            raise Halted(str(error)) from None
        except GuardError as error:
            if isinstance(error, NotSupported) and error.reason != "UNSCANNABLE":
                raise Halted(str(error)) from None
            self._pace.answered()
            return error
        assert verdict.judged  # the client raises unless told otherwise
        self._pace.answered()
        return verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """A record and the answer to come."""

    record: Record
    future: Future[Verdict | GuardError | None]


# What the reader hands on: answers in order, then None, or why it could not read on.
Answers = queue.Queue[Answer | OSError | None]


def _write_all(
    judge: Judge, records: Iterator[Record], output: Output, done: Done, tell: Callable[[], None]
) -> None:
    """Judge the records and write the answers in their order."""
    answers: Answers = queue.Queue(judge.window)
    pool = ThreadPoolExecutor(judge.threads, thread_name_prefix="bulk")
    over = threading.Event()
    reading = (judge, records, pool, answers, over)
    threading.Thread(target=_read_all, args=reading, name="bulk-reader", daemon=True).start()
    flushed = time.monotonic()
    try:
        while (answer := answers.get()) is not None:
            if isinstance(answer, OSError):
                raise answer
            output.write(_line(answer, done))
            tell()
            waits_for_more = answers.empty() and output.flushes_cheaply
            if waits_for_more or time.monotonic() - flushed >= FLUSH_EVERY_S:
                output.flush()
                flushed = time.monotonic()
    finally:
        over.set()
        judge.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _read_all(
    judge: Judge,
    records: Iterator[Record],
    pool: ThreadPoolExecutor,
    answers: Answers,
    over: threading.Event,
) -> None:
    """Read records and hand them to the pool, never further ahead than the queue is long."""
    last: OSError | None = None
    try:
        for record in records:
            if over.is_set():
                return
            _put(answers, Answer(record, pool.submit(judge, record)), over)
    except (OSError, EOFError, zlib.error) as broken:
        last = OSError(f"the input is broken: {broken}")
    except RuntimeError:
        return  # the pool is closed: the run is over
    _put(answers, last, over)


def _put(answers: Answers, answer: Answer | OSError | None, over: threading.Event) -> None:
    while not over.is_set():
        try:
            answers.put(answer, timeout=0.2)
            return
        except queue.Full:
            continue


def _line(answer: Answer, done: Done) -> bytes:
    """The output line of an answer, counted; waits for it."""
    found = answer.future.result()
    if isinstance(found, Verdict):
        if done.stamp is not None and not same_judge(done.stamp, found):
            raise NotResumable("its lines were judged by another model or policy")
        line, done.stamp = verdict_line(answer.record, found), stamp(found)
    else:
        line = error_line(answer.record, found)
        done.errors += 1
    done.lines += 1
    return line


def _check_paths(source: Path, result: Path) -> None:
    if str(source) != "-" and not source.is_file():
        exits.fail(f"there is no file {source}", exits.USAGE)
    if str(result) == "-":
        return
    if not result.absolute().parent.is_dir():
        exits.fail(f"there is no folder {result.absolute().parent}", exits.USAGE)
    if result.exists() and (not result.is_file() or result.samefile(source)):
        exits.fail("OUT must be a file of its own", exits.USAGE)


def say(message: str) -> None:
    """To the person at the terminal."""
    print(f"guardctl: {exits.printable(message)}", file=sys.stderr, flush=True)
