"""How Envoy is set to send bodies, and which ways can keep what the guard promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.ext_proc.wire import Misled

Mode: TypeAlias = pb.BodySendMode.ValueType

NONE: Mode = pb.BODY_SEND_MODE_NONE
STREAMED: Mode = pb.BODY_SEND_MODE_STREAMED
BUFFERED: Mode = pb.BODY_SEND_MODE_BUFFERED
DUPLEX: Mode = pb.BODY_SEND_MODE_FULL_DUPLEX_STREAMED
_SCREENED = (STREAMED, BUFFERED, DUPLEX)

# Sent with the answer to a request that is not screened: Envoy need not ask about the rest of it.
NOTHING_MORE = pb.ProcessingMode(
    response_header_mode=pb.HEADER_SEND_MODE_SKIP,
    request_body_mode=NONE,
    response_body_mode=NONE,
    request_trailer_mode=pb.HEADER_SEND_MODE_SKIP,
    response_trailer_mode=pb.HEADER_SEND_MODE_SKIP,
)


@dataclass(frozen=True, slots=True)
class Modes:
    """How the two bodies of an exchange come; None where Envoy does not say."""

    request: Mode | None
    response: Mode | None
    early_bodies: bool = False

    @property
    def problem(self) -> str:
        """Why an exchange cannot be screened this way; empty when it can."""
        if self.request is None:
            return "Envoy does not tell its protocol_config: version 1.34 or newer is needed"
        for name, mode in (("request", self.request), ("response", self.response)):
            if mode not in _SCREENED:
                return (
                    f"{name}_body_mode {_name(mode)} hides what is to be screened: "
                    "set FULL_DUPLEX_STREAMED, BUFFERED or STREAMED"
                )
        if self.early_bodies:
            return "send_body_without_waiting_for_header_response is not supported: leave it out"
        return ""

    def demand(self) -> None:
        """Raises Misled with the problem."""
        if self.problem:
            raise Misled(self.problem)


# In observability mode Envoy sends bodies in no other way, and does not say so.
OBSERVED = Modes(STREAMED, STREAMED)


def modes_of(first: pb.ProcessingRequest) -> Modes:
    """What the first message of a stream tells."""
    if not first.HasField("protocol_config"):
        return Modes(None, None)
    told = first.protocol_config
    return Modes(
        told.request_body_mode,
        told.response_body_mode,
        told.send_body_without_waiting_for_header_response,
    )


def _name(mode: Mode | None) -> str:
    names = {value: name for name, value in pb.BodySendMode.items()}
    return names.get(mode or NONE, str(mode)).removeprefix("BODY_SEND_MODE_")
