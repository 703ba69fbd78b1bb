"""Makes a conversation ready for a model that sees images: each image fetched, decoded, bounded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guard_policies.schema import ImageUris
from guard_service.conversation import Conversation, Image, Part
from guard_service.errors import InvalidRequest
from guard_service.images.decoder import Decoder
from guard_service.images.reasons import Reason, Refused

if TYPE_CHECKING:
    from guard_service.images.fetch import Fetcher  # loaded where a policy has images fetched

READING = 16  # images at once, so that few bytes wait for a process that decodes
_DATA = re.compile(r"data:[\w.+/-]*(?:;[\w.+=/-]*)*;base64,(?P<encoded>.*)", re.I | re.A | re.S)


@dataclass(frozen=True, slots=True)
class ImageBounds:
    """What the images of one conversation are held to."""

    images: int
    bytes: int  # of one image


class ImageReader:
    """Reads images, fetching those given by address if it has a fetcher. For one event loop."""

    def __init__(self, decoder: Decoder, fetcher: Fetcher | None, bounds: ImageBounds) -> None:
        self.decoder = decoder
        self._fetcher = fetcher
        self._bounds = bounds
        self._reading = asyncio.Semaphore(READING)

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
        self.decoder.close()
        if self._fetcher is not None:
            self._fetcher.close()

    async def _part(self, part: Part, uris: ImageUris) -> Part:
        if not isinstance(part, Image) or part.picture is not None or part.unread:
            return part
        try:
            async with self._reading:
                data = await self._bytes(part, uris)
                if len(data) > self._bounds.bytes:
                    raise Refused(Reason.TOO_LARGE)
                decoded = await self.decoder.decode(data)
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
