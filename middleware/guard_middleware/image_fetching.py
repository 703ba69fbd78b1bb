"""Images given by address: the guard fetches and judges them, and what it saw takes their place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from guard_middleware.formats.image_urls import image_urls
from guard_middleware.strict_json import Json
from guard_middleware.verdict import Outcome, SeenImage

MOST = 16  # addresses of one request; what goes beyond is not fetched, and so not read


@runtime_checkable
class Fetching(Protocol):
    """A guard that fetches images, too."""

    async def image_at(self, url: str) -> SeenImage:
        """The image behind an address, judged by itself. Raises nothing, as `Guard.judge`."""
        ...


async def inlined(guard: Fetching, protocol: str, body: Json) -> Sequence[Outcome]:
    """Put images in the place of their addresses, in the body itself; what was said of each.

    An address stays where the guard has no image for it. The images are by then judged by
    themselves; that they are judged with the text is left to the caller.
    """
    places = image_urls(protocol, body)[:MOST]
    seen = await asyncio.gather(*(guard.image_at(place.url) for place in places))
    for place, one in zip(places, seen, strict=True):
        if one.data_url:
            place.put(one.data_url)
    return [one.outcome for one in seen]
