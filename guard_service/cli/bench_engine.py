"""The bare engine under the prompts that the service makes: what the service is compared with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from guard_policies.assessment import Direction
from guard_policies.loader import builtin_policies
from guard_policies.schema import Policy
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.cli.bench_load import Requests, Tally
from guard_service.config import Settings
from guard_service.engines import Engine, open_engine
from guard_service.prompt import Prompt
from guard_service.wire import Sizes, conversation_of

_POOL = 512  # prompts made beforehand and used in turn


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What the engine did with batches of one size."""

    batch: int
    tally: Tally


def measure(
    model: str,
    policy: str,
    requests: Requests,
    batches: tuple[int, ...],
    duration_s: float,
    warm_up_s: float,
    prefix_cache: bool = True,
    threads: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[EngineRun]:
    """Run the engine on the requests' prompts in batches of each size, for `duration_s` each.

    `threads` 0 takes one for each core of this process.
    """
    settings = Settings()
    engine = open_engine(
        model,
        threads or settings.engine_threads,
        prefix_cache,
        plan=settings.kernel_plan,
        prepared=settings.prepared_folder,
    )
    try:
        prompts = _prompts(engine, builtin_policies().get(policy), requests)
        _run(engine, prompts, batches[-1], warm_up_s, clock)
        return [
            EngineRun(batch, _run(engine, prompts, batch, duration_s, clock)) for batch in batches
        ]
    finally:
        engine.close()


def _prompts(engine: Engine, policy: Policy | None, requests: Requests) -> list[Prompt]:
    """The prompts of the first requests, made as the service makes them."""
    card, builder = engine.card, engine.prompt_builder()
    own = tuple(category for category in LLAMA_GUARD_3 if category.code in card.categories)
    prompts: list[Prompt] = []
    sizes = Sizes(Settings().max_messages, Settings().max_parts)
    for request in itertools.islice(requests, _POOL):
        conversation = conversation_of(request.conversation, sizes)
        way = Direction.RESPONSE if conversation.messages[-1].is_response else Direction.PROMPT
        judged = policy.judged(way) if policy and card.custom_categories else ()
        prompts.extend(builder.build(conversation, judged or own).prompts)
    return prompts


def _run(
    engine: Engine,
    prompts: list[Prompt],
    batch: int,
    duration_s: float,
    clock: Callable[[], float],
) -> Tally:
    tally, begun = Tally(), clock()
    turn = itertools.cycle(prompts)
    while (start := clock()) - begun < duration_s:
        results = engine.assess(list(itertools.islice(turn, batch)))
        took_s = clock() - start
        tally.latencies_s.extend([took_s] * len(results))
        tally.tokens += sum(result.computed_tokens for result in results)
    tally.elapsed_s = clock() - begun
    return tally
