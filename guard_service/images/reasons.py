"""Why an image, or a part of it, is not shown to a model."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The spelling that a verdict's coverage has."""

    EMPTY = "IMAGE_EMPTY"
    TOO_LARGE = "IMAGE_TOO_LARGE"  # in bytes
    UNKNOWN_FORMAT = "IMAGE_UNKNOWN_FORMAT"  # none of JPEG, PNG, WebP, GIF, BMP
    UNSUPPORTED = "IMAGE_UNSUPPORTED"  # a kind of these that is not decoded
    TRUNCATED = "IMAGE_TRUNCATED"
    TRAILING_DATA = "IMAGE_TRAILING_DATA"  # bytes that do not belong to the image
    MALFORMED = "IMAGE_MALFORMED"
    TOO_MANY_PIXELS = "IMAGE_TOO_MANY_PIXELS"
    TOO_NARROW = "IMAGE_TOO_NARROW"  # one side is too many times as long as the other
    TOO_MANY_FRAMES = "IMAGE_TOO_MANY_FRAMES"
    TOO_MUCH_METADATA = "IMAGE_TOO_MUCH_METADATA"
    TOO_COSTLY = "IMAGE_TOO_COSTLY"  # decoding takes too much time or memory
    DECODER_DIED = "IMAGE_DECODER_DIED"
    FIRST_FRAME_ONLY = "IMAGE_FIRST_FRAME_ONLY"  # judged: the first frame

    URI_NOT_ALLOWED = "IMAGE_URI_NOT_ALLOWED"  # the policy allows none
    URI_MALFORMED = "IMAGE_URI_MALFORMED"
    URI_SCHEME = "IMAGE_URI_SCHEME"  # one that the policy does not allow
    URI_HOST = "IMAGE_URI_HOST"
    URI_PORT = "IMAGE_URI_PORT"
    URI_UNRESOLVED = "IMAGE_URI_UNRESOLVED"
    URI_ADDRESS = "IMAGE_URI_ADDRESS"  # the host's address is not a public one
    URI_UNREACHABLE = "IMAGE_URI_UNREACHABLE"  # no connection, or no TLS that can be trusted
    URI_REDIRECT = "IMAGE_URI_REDIRECT"
    URI_STATUS = "IMAGE_URI_STATUS"  # any but 200
    URI_ENCODED = "IMAGE_URI_ENCODED"  # sent compressed, which was not asked for
    URI_TOO_SLOW = "IMAGE_URI_TOO_SLOW"


class Refused(Exception):
    """An image that is not shown to a model; says nothing of its content."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason
