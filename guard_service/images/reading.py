"""Makes a conversation ready for a model that sees images: each image fetched, decoded, bounded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from guard_policies.schema import ImageUris, Policy
from guard_service.cache import SingleFlight
from guard_service.config import Settings
from guard_service.conversation import Conversation, Image, Part
from guard_service.errors import InvalidRequest, PolicyNotSupported
from guard_service.images.decoder import Decoded, Decoder, DecoderBounds
from guard_service.images.reasons import Reason, Refused

if TYPE_CHECKING:
    from guard_service.images.fetch import Fetcher  # loaded where a policy has images fetched

JUDGED = "JUDGED"
PIXEL = b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
READING = 16  # images at once, so that few bytes wait for a process that decodes
_DATA = re.compile(r"data:[\w.+/-]*(?:;[\w.+=/-]*)*;base64,(?P<encoded>.*)", re.I | re.A | re.S)


@dataclass(frozen=True, slots=True)
class ImageBounds:
    """What the images of one conversation are held to."""

    images: int
    bytes: int  # of one image


class ImageReader:
    """Reads images, fetching those given by address if it has a fetcher. For one event loop.

    `on_read` is told what became of each: JUDGED, or the reason why it cannot be.
    """

    def __init__(
        self,
        decoder: Decoder,
        fetcher: Fetcher | None,
        bounds: ImageBounds,
        on_read: Callable[[str], None] = lambda result: None,
    ) -> None:
        self._decoder = decoder
        self._fetcher = fetcher  # None as long as no policy has images fetched
        self._bounds = bounds
        self._on_read = on_read
        self._reading = asyncio.Semaphore(READING)
        self._flights: SingleFlight[Decoded] = SingleFlight()

    @property
    def held_bytes(self) -> int:
        """Bytes of all images that somebody still has."""
        return self._decoder.held_bytes

    def prepare_for(self, policies: Iterable[Policy], timeout_s: float) -> None:
        """Have a fetcher when a policy wants images fetched. Raises PolicyNotSupported when nothing
        is there to do it with."""
        wanted = [policy.name for policy in policies if policy.image_uris.hosts]
        if wanted and self._fetcher is None:
            self._fetcher = _fetcher(timeout_s, wanted[0])

    async def start(self) -> None:
        """Start a process that decodes; raises NotAssessed, or Refused, when it does not work."""
        await self._decoder.decode(PIXEL)

    async def ready(self, conversation: Conversation, uris: ImageUris) -> Conversation:
        """The conversation with a picture, or the reason why there is none, in every image.

        What is ready stays as it is. Raises InvalidRequest for too many images, and what `decode`
        raises that is no fault of an image.
        """
        parts = [part for message in conversation.messages for part in message.parts]
        count = sum(isinstance(part, Image) for part in parts)
        if not count:
            return conversation
        if count > self._bounds.images:
            raise InvalidRequest(
                f"the conversation has {count} images, over the limit of {self._bounds.images}"
            )
        tasks = [asyncio.create_task(self._part(part, uris)) for part in parts]
        try:
            ready = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        return Conversation(
            tuple(
                replace(message, parts=tuple(next(ready) for _ in message.parts))
                for message in conversation.messages
            )
        )

    def close(self) -> None:
        """End the processes that decode; fetch no more."""
        self._decoder.close()
        if self._fetcher is not None:
            self._fetcher.close()

    async def _part(self, part: Part, uris: ImageUris) -> Part:
        if not isinstance(part, Image) or part.picture is not None or part.unread:
            return part
        ready = await self._ready(part, uris)
        self._on_read(ready.unread or JUDGED)
        return ready

    async def _ready(self, part: Image, uris: ImageUris) -> Image:
        try:
            async with self._reading:
                data = await self._bytes(part, uris)
                if len(data) > self._bounds.bytes:
                    raise Refused(Reason.TOO_LARGE)
                # Turns of one conversation are judged side by side and have their images in common.
                decoded, _ = await self._flights.run(data, partial(self._decoder.decode, data))
        except Refused as refused:
            return replace(part, unread=refused.reason.value)
        usual, *others = decoded.views
        return Image(
            data=data,
            uri=part.uri,
            mime_type=decoded.mime_type,
            digest=decoded.digest,
            picture=usual,
            other_views=tuple(others),
            unread=Reason.FIRST_FRAME_ONLY.value if decoded.frames > 1 else "",
        )

    async def _bytes(self, image: Image, uris: ImageUris) -> bytes:
        if image.data is not None:
            return image.data
        uri = image.uri or ""
        if uri[:5].lower() == "data:":
            return self._inline(uri)
        if self._fetcher is None:
            raise Refused(Reason.URI_NOT_ALLOWED)
        return await self._fetcher.fetch(uri, uris, self._bounds.bytes)

    def _inline(self, uri: str) -> bytes:
        """The bytes of a data: URI (RFC 2397), in base64."""
        found = _DATA.fullmatch(uri)
        if found is None:
            raise Refused(Reason.URI_MALFORMED)
        if len(found["encoded"]) * 3 // 4 > self._bounds.bytes + 2:
            raise Refused(Reason.TOO_LARGE)
        try:
            return base64.b64decode(found["encoded"], validate=True)
        except (binascii.Error, ValueError):
            raise Refused(Reason.URI_MALFORMED) from None


def image_reader(settings: Settings, on_read: Callable[[str], None]) -> ImageReader:
    """As set, and for policies that have nothing fetched."""
    bounds = DecoderBounds(
        workers=settings.image_workers,
        pixels=settings.max_image_pixels,
        timeout_s=settings.image_timeout_s,
        held_bytes=settings.image_bytes,
    )
    limits = ImageBounds(settings.max_images, settings.max_image_bytes)
    return ImageReader(Decoder(bounds), None, limits, on_read)


def _fetcher(timeout_s: float, policy: str) -> Fetcher:
    try:
        from guard_service.images.fetch import Fetcher
    except ModuleNotFoundError:
        raise PolicyNotSupported(
            f"policy {policy} lets images be fetched (image_uris), which needs more packages: "
            "pip install 'llama-guard-service[fetch]'"
        ) from None
    return Fetcher(timeout_s)
