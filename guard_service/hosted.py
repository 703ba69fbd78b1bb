"""A model in this process: how it is opened, the queue before it, and its road to a verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager

from guard_policies.schema import Policy
from guard_service.batcher import Batcher
from guard_service.batcher import Limits as QueueLimits
from guard_service.config import Settings
from guard_service.engines import Engine, ModelCard, open_engine
from guard_service.images.reading import image_reader
from guard_service.matching import unsupported
from guard_service.metrics import EngineMetrics, show_only
from guard_service.moderation import Bounds, Moderator
from guard_service.security.signatures import check_signed
from guard_service.tracing import exemplar


class Hosted:
    """What one loaded model needs to serve. For one event loop; the engine is the caller's."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: EngineMetrics,
        on_health: Callable[[bool], None] = lambda healthy: None,
    ) -> None:
        self.engine = engine
        self._settings = settings
        self._metrics = metrics
        self._crowded_out = 0
        self._images = None
        if engine.card.judges_images:
            self._images = image_reader(settings, self._read)
        self.batcher = Batcher(
            engine,
            QueueLimits(
                queue_items=settings.max_queue_items,
                queue_tokens=settings.max_queue_tokens,
                batch_items=settings.batch_items,
                batch_tokens=settings.batch_tokens,
                engine_timeout_s=settings.engine_timeout_s,
            ),
            on_health=on_health,
            on_run=self._ran,
        )
        self.moderator = Moderator(
            engine,
            self.batcher,
            Bounds(
                settings.max_conversation_tokens,
                settings.max_conversation_chars,
                settings.max_queue_items,
            ),
            settings.cache_entries,
            metrics,
            self._images,
        )

    @property
    def card(self) -> ModelCard:
        """The model."""
        return self.engine.card

    def prepare_for(self, policies: Iterable[Policy]) -> None:
        """Make ready what the policies need; raises PolicyNotSupported."""
        if self._images is not None:
            self._images.prepare_for(policies, self._settings.fetch_timeout_s)

    async def start(self, policies: Iterable[Policy]) -> None:
        """Check the model against its golden prompts, then judge a greeting under a policy that it
        serves, if there is one. Raises EngineFailed when it scores otherwise than recorded, and
        NotAssessed when images cannot be decoded here."""
        self.batcher.start()
        await asyncio.to_thread(self.engine.self_test)
        if self._images is not None:
            await self._images.start()
        served = (one for one in policies if not unsupported(one, self.engine.card))
        if (policy := next(served, None)) is not None:
            await self.moderator.warm_up(policy)

    async def close(self) -> None:
        """Fail what waits, end what runs."""
        await self.batcher.close()
        self.moderator.close()
        if self._images is not None:
            await asyncio.to_thread(self._images.close)

    def _read(self, result: str) -> None:
        self._metrics.images.labels(result).inc()

    def _ran(self, items: int, seconds: float) -> None:
        self._metrics.batch_items.observe(items)
        self._metrics.inference_seconds.observe(seconds, exemplar())
        crowded_out = self.engine.sessions_crowded_out
        self._metrics.sessions_crowded_out.inc(crowded_out - self._crowded_out)
        self._crowded_out = crowded_out

    def describe(self) -> None:
        """Show this model in the metrics, in place of another."""
        card, metrics = self.card, self._metrics
        show_only(metrics.model_info, {(card.name, card.digest, card.engine, card.template)})
        metrics.cache_entries.set_function(lambda: self.moderator.remembered)
        metrics.image_bytes.set_function(lambda: self._images.held_bytes if self._images else 0)
        metrics.queue_items.set_function(lambda: self.batcher.queued_items)
        metrics.queue_tokens.set_function(lambda: self.batcher.queued_tokens)
        metrics.session_bytes.set_function(lambda: self.engine.session_bytes)


@contextmanager
def engines_of(settings: Settings) -> Iterator[tuple[Engine, Engine | None]]:
    """The models as set, the second only where one is to be in this process; closed on leaving.

    Raises ArtifactError, EngineFailed or OSError.
    """
    with ExitStack() as stack:
        first = stack.enter_context(closing(opened(settings, settings.model)))
        second = None
        if settings.second_model:
            second = stack.enter_context(closing(opened(settings, settings.second_model)))
        yield first, second


def opened(settings: Settings, model: str, plan: str = "") -> Engine:
    """A model by the other settings, and by another kernel plan than theirs where one is given.
    Raises ArtifactError, EngineFailed or OSError."""
    if settings.model_key is not None:
        check_signed(model, settings.model_key)
    return open_engine(
        model,
        settings.engine_threads,
        session_bytes=settings.session_bytes,
        plan=plan or settings.kernel_plan,
        lanes=settings.engine_lanes,
        prepared=settings.prepared_folder,
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        image_cache_bytes=settings.image_cache_bytes,
    )
