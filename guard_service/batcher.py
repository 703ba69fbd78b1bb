"""From requests to batches: a bounded queue in front of the threads that run the engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from guard_service.engines import Assessed, Engine, EngineFailed, EngineOverloaded, Session
from guard_service.errors import (
    GuardServiceError,
    NotAssessed,
    NotReady,
    Overloaded,
    ShuttingDown,
)
from guard_service.prompt import Prompt
from guard_service.security.shares import Shares
from guard_service.security.whose import WHOSE
from guard_service.tracing import SPOT, Spot, engine_run

LOG = logging.getLogger(__name__)
VERDICT_TOKENS = 3  # what engines append to a prompt
CANDIDATES = 256  # how far into the queue a batch looks for prompts of similar length
JOIN_S = 5.0  # at the end, for a run in progress
MIN_RETRY_S, MAX_RETRY_S = 0.05, 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the queue and of one engine run."""

    queue_items: int
    queue_tokens: int
    batch_items: int
    batch_tokens: int
    engine_timeout_s: float


@dataclass(frozen=True, slots=True)
class Ran:
    """What the engine found for the prompts of one request, and the time it took, in seconds."""

    results: tuple[Assessed, ...]
    queue_s: float
    inference_s: float


@dataclass(slots=True, eq=False)
class _Job:
    """One prompt in the queue."""

    prompt: Prompt
    tokens: int
    queued_at: float
    session: Session | None
    future: asyncio.Future[tuple[Assessed, float, float]] = field(repr=False)
    spot: Spot | None = None
    whose: str = ""  # the tenant's


@dataclass(slots=True, eq=False)
class _Worker:
    """One thread, and the run that it is in."""

    thread: threading.Thread
    running: list[_Job] = field(default_factory=list)
    run_began: float | None = None


def tokens_of(prompt: Prompt, session: Session | None = None) -> int:
    """What a prompt costs the engine. The prefix is shared and counts for nothing."""
    held = session.held(prompt) if session is not None else 0
    return len(prompt.body) - held + len(prompt.closing) + VERDICT_TOKENS


class Batcher:
    """Admits prompts up to a bound and runs them in batches.

    `assess` belongs to one event loop; the engine runs in threads of its own, one for each of its
    lanes, and is entered by no other. `on_health` is called in the loop with False when a worker
    died or hangs, and with True when a hanging run came back. `on_run` is called in the worker's
    thread after each run.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        on_health: Callable[[bool], None] = lambda healthy: None,
        on_run: Callable[[int, float], None] = lambda items, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._on_health = on_health
        self._on_run = on_run
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: dict[_Job, None] = {}  # in order of arrival
        self._queued_tokens = 0
        self._shares = Shares()
        self._tokens_per_s = 0.0  # of one worker
        self._closing = False
        self._healthy = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers = [_Worker(self._thread(lane)) for lane in range(engine.lanes)]
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the workers; to be called in the event loop that will call `assess`."""
        self._loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.thread.start()
        self._watch = asyncio.create_task(self._watch_workers())

    @property
    def queued_items(self) -> int:
        """Prompts that wait."""
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._queued_tokens

    @property
    def healthy(self) -> bool:
        """Whether all workers answer."""
        return self._healthy

    async def assess(
        self, prompts: Sequence[Prompt], patience_s: float, session: Session | None = None
    ) -> Ran:
        """Results of all prompts, in order. Those of a session run one by one, in order.

        Raises Overloaded at once when the queue has no room for all of them, or would not reach
        them within `patience_s`. Cancelling takes what still waits out of the queue.
        """
        jobs = self._admitted(prompts, patience_s, session)
        try:
            done = [await job.future for job in jobs]
        finally:
            self._drop(jobs)
        return Ran(
            results=tuple(assessed for assessed, _, _ in done),
            queue_s=max(queue_s for _, queue_s, _ in done),
            inference_s=max(inference_s for _, _, inference_s in done),
        )

    async def close(self) -> None:
        """Fail what still waits, let runs in progress end, stop the workers."""
        if self._watch is not None:
            self._watch.cancel()
        with self._changed:
            self._closing = True
            waiting = list(self._queue)
            self._changed.notify_all()
        for job in waiting:
            _fail(job, ShuttingDown())
        self._drop(waiting)
        if self._healthy:
            await asyncio.to_thread(self._join)
        for job in self._in_progress():
            _fail(job, ShuttingDown())

    def _thread(self, lane: int) -> threading.Thread:
        name = f"guard-engine-{lane}"
        return threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)

    def _join(self) -> None:
        latest = time.monotonic() + JOIN_S
        for worker in self._workers:
            if worker.thread.is_alive():
                worker.thread.join(max(latest - time.monotonic(), 0))

    def _in_progress(self) -> list[_Job]:
        return [job for worker in self._workers for job in worker.running]

    def _admitted(
        self, prompts: Sequence[Prompt], patience_s: float, session: Session | None
    ) -> list[_Job]:
        loop, now, spot, whose = asyncio.get_running_loop(), self._clock(), SPOT.get(), WHOSE.get()
        jobs = [
            _Job(
                prompt, tokens_of(prompt, session), now, session, loop.create_future(), spot, whose
            )
            for prompt in prompts
        ]
        tokens = sum(job.tokens for job in jobs)
        with self._changed:
            leaving = self._room_for(whose, len(jobs), tokens, patience_s)
            for job in leaving:
                self._take_out(job)
            self._queue.update(dict.fromkeys(jobs))
            self._shares.join(jobs)
            self._queued_tokens += tokens
            self._changed.notify_all()
        for job in leaving:
            _fail(job, Overloaded("the queue is full; retry later", self._retry_s(1, job.tokens)))
        return jobs

    def _room_for(self, whose: str, items: int, tokens: int, patience_s: float) -> list[_Job]:
        """What has to leave the queue; raises when there is no room."""
        if self._closing:
            raise ShuttingDown
        if not self._healthy:
            raise NotReady("the engine does not answer; try another replica")
        limits, wait_s = self._limits, self._wait_s(self._shares.ahead(whose))
        over_items = len(self._queue) + items - limits.queue_items
        over_tokens = self._queued_tokens + tokens - limits.queue_tokens
        leaving: list[_Job] | None = []
        if self._queue and (over_items > 0 or over_tokens > 0):
            newest_first = reversed(self._queue)
            leaving = self._shares.giving_way(newest_first, whose, tokens, over_items, over_tokens)
        if leaving is None:
            raise Overloaded("the queue is full; retry later", self._retry_s(items, tokens))
        if wait_s > patience_s:
            raise Overloaded(
                "the queue is longer than the deadline; retry later", min(wait_s, MAX_RETRY_S)
            )
        return leaving

    def _wait_s(self, tokens: int) -> float:
        """How long that many tokens take at the measured rate; 0 when nothing was measured yet."""
        rate = self._tokens_per_s * len(self._workers)
        return tokens / rate if rate else 0.0

    def _retry_s(self, items: int, tokens: int) -> float:
        """When there will be room: the time to drain what is in the way, at the measured rate."""
        over = self._queued_tokens + tokens - self._limits.queue_tokens
        over_items = len(self._queue) + items - self._limits.queue_items
        mean = self._queued_tokens / max(len(self._queue), 1)
        excess = max(over, over_items * mean, 0)
        return min(max(self._wait_s(int(excess)), MIN_RETRY_S), MAX_RETRY_S)

    def _drop(self, jobs: Sequence[_Job]) -> None:
        """Take what still waits out of the queue."""
        with self._changed:
            for job in jobs:
                if job in self._queue:
                    self._take_out(job)
        for job in jobs:
            if job.future.done() and not job.future.cancelled():
                job.future.exception()  # seen: a sibling already failed the request
            job.future.cancel()

    def _take_out(self, job: _Job) -> None:
        del self._queue[job]
        self._shares.leave(job)
        self._queued_tokens -= job.tokens

    def _work(self, lane: int) -> None:
        """A worker's thread."""
        worker = self._workers[lane]
        try:
            while batch := self._next_batch(worker):
                self._run(worker, batch)
        except BaseException:
            LOG.exception("a worker of the engine died")

    def _next_batch(self, worker: _Worker) -> list[_Job]:
        """Wait for work and take it out of the queue; empty when closing."""
        with self._changed:
            worker.running = []
            if len(self._workers) > 1:
                self._changed.notify_all()  # a session that ran may go on in another lane
            while not (ready := self._ready()) and not self._closing:
                self._changed.wait()
            if self._closing:
                return []
            batch = chosen(self._shares.in_turn(ready), self._limits)
            self._shares.serve(batch)
            for job in batch:
                self._take_out(job)
            worker.running = batch
            worker.run_began = self._clock()
            return batch

    def _ready(self) -> list[_Job]:
        """What waits, but for prompts of a session that is in a run."""
        busy = {job.session for job in self._in_progress()} - {None}
        return [job for job in self._queue if job.session not in busy] if busy else [*self._queue]

    def _run(self, worker: _Worker, batch: list[_Job]) -> None:
        began = self._clock()
        outcomes = self._outcomes([job.prompt for job in batch], batch[0].session or self._engine)
        seconds = self._clock() - began
        worker.run_began = None
        rate = sum(job.tokens for job in batch) / max(seconds, 1e-6)
        self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * rate if self._tokens_per_s else rate
        engine_run([(job.spot, began - job.queued_at) for job in batch], seconds)
        SPOT.set(batch[0].spot)  # for the exemplar of what is measured of the run
        self._on_run(len(batch), seconds)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_deliver, batch, outcomes, began, seconds)

    def _outcomes(
        self, prompts: list[Prompt], judge: Engine | Session
    ) -> list[Assessed | GuardServiceError]:
        """Run the batch; when it fails, its prompts one by one, so that only the culprit fails."""
        try:
            results = judge.assess(prompts)
            if len(results) != len(prompts):
                raise EngineFailed("the engine lost results")
            return list(results)
        except Exception as error:
            LOG.error("engine run failed: %s", type(error).__name__, exc_info=error)
            if len(prompts) > 1:
                return [self._outcomes([prompt], judge)[0] for prompt in prompts]
            if isinstance(error, EngineOverloaded):
                return [Overloaded(str(error), MIN_RETRY_S)]
            known = isinstance(error, EngineFailed)  # its text is safe to show
            return [NotAssessed(str(error) if known else "the engine failed on this request")]

    async def _watch_workers(self) -> None:
        period_s = min(1.0, self._limits.engine_timeout_s / 4)
        while True:
            await asyncio.sleep(period_s)
            self._check_workers()

    def _answers(self, worker: _Worker) -> bool:
        began, most_s = worker.run_began, self._limits.engine_timeout_s
        return worker.thread.is_alive() and (began is None or self._clock() - began <= most_s)

    def _check_workers(self) -> None:
        healthy = all(map(self._answers, self._workers))
        if healthy == self._healthy:
            return
        self._healthy = healthy
        LOG.log(logging.INFO if healthy else logging.ERROR, "workers answer: %s", healthy)
        if not healthy:
            with self._changed:
                stuck = [*self._in_progress(), *self._queue]
            for job in stuck:
                _fail(job, NotReady("the engine does not answer; try another replica"))
            self._drop(stuck)
        self._on_health(healthy)


def chosen(queue: Sequence[_Job], limits: Limits) -> list[_Job]:
    """The next batch: the first prompt, then those most like it, while the padded batch fits.

    The first is always in, so that none starves; prompts that share its prefix come first. What
    belongs to a session shares no state with others, so it runs alone.
    """
    head = queue[0]
    if head.session is not None:
        return [head]
    others = sorted(
        (job for job in queue[1:CANDIDATES] if job.session is None),
        key=lambda job: (
            job.prompt.prefix is not head.prompt.prefix and job.prompt.prefix != head.prompt.prefix,
            abs(job.tokens - head.tokens),
        ),
    )
    batch, longest = [head], head.tokens
    for job in others:
        longest = max(longest, job.tokens)
        if len(batch) == limits.batch_items or longest * (len(batch) + 1) > limits.batch_tokens:
            break
        batch.append(job)
    return batch


def _deliver(
    batch: Sequence[_Job],
    outcomes: Sequence[Assessed | GuardServiceError],
    began: float,
    seconds: float,
) -> None:
    for job, outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, GuardServiceError):
            _fail(job, outcome)
        elif not job.future.done():
            job.future.set_result((outcome, began - job.queued_at, seconds))


def _fail(job: _Job, error: GuardServiceError) -> None:
    if not job.future.done():
        job.future.set_exception(error)
