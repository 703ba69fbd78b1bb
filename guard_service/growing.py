"""The checks of one growing conversation: each computes only what the last one had not."""

from __future__ import annotations

from collections.abc import Sequence

from guard_service.batcher import Batcher, Ran
from guard_service.engines import Assessed, Session
from guard_service.prompt import Prompt


class Growing:
    """Stands before the batcher for one conversation. For one event loop, one check at a time.

    A window that the last check judged, token for token, keeps its assessment; the others go to the
    engine's session, if it has such, which keeps the state of the last of them.
    """

    def __init__(self, batcher: Batcher, session: Session | None) -> None:
        self._batcher = batcher
        self._session = session
        self._known: dict[Prompt, Assessed] = {}

    async def assess(self, prompts: Sequence[Prompt], patience_s: float) -> Ran:
        """As the batcher's: all prompts, in order, and what it raises."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        ran = Ran((), 0.0, 0.0)
        if new:
            ran = await self._batcher.assess(new, patience_s, self._session)
        found = {**self._known, **dict(zip(new, ran.results, strict=True))}
        results = []
        for prompt in prompts:
            results.append(found[prompt])
            found[prompt] = _again(found[prompt])
        self._known = {prompt: found[prompt] for prompt in prompts}
        return Ran(tuple(results), ran.queue_s, ran.inference_s)

    def close(self) -> None:
        """Free what is held. A check that still runs comes to its end."""
        self._known.clear()
        if self._session is not None:
            self._session.close()


def _again(found: Assessed) -> Assessed:
    """The same assessment, which this time costs nothing."""
    return Assessed(found.assessment, 0, found.computed_tokens + found.cached_tokens)
