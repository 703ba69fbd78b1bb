"""What goes out and what comes back in one call, whether the client blocks or awaits."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from guard_api.v1 import guard_pb2
from guard_middleware.errors import BadReply, GuardError, from_item
from guard_middleware.fallback import Fallback
from guard_middleware.retry import passing
from guard_middleware.turns import Turns, direction_of, read_turns
from guard_middleware.verdict import Outcome, SeenImage, StreamOutcome, read_result, read_verdict
from guard_policies.assessment import Direction

SERVICE = "guard_api.v1.GuardService"


@dataclass(frozen=True, slots=True)
class Item:
    """One conversation of a batch."""

    turns: Turns
    policy: str = ""
    language: str = ""
    no_cache: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Text added to a growing reply; `check` asks for a verdict up to and with it."""

    text: str
    check: bool = False


def classify_request(item: Item) -> guard_pb2.ClassifyRequest:
    """The wire's request; raises ValueError for what is no conversation."""
    return guard_pb2.ClassifyRequest(
        conversation=read_turns(item.turns),
        policy=item.policy,
        language=item.language,
        no_cache=item.no_cache,
    )


def image_request(url: str, policy: str, language: str) -> guard_pb2.ClassifyRequest:
    """The wire's request about an image that the guard is to fetch and to give back. Raises
    ValueError for a lone surrogate."""
    try:
        part = guard_pb2.Part(image=guard_pb2.Image(uri=url))
    except UnicodeEncodeError:
        raise ValueError("the address is not well-formed Unicode") from None
    message = guard_pb2.Message(role=guard_pb2.ROLE_USER, parts=[part])
    return guard_pb2.ClassifyRequest(
        conversation=guard_pb2.Conversation(messages=[message]),
        policy=policy,
        language=language,
        return_images=True,
    )


def seen_image(reply: guard_pb2.ClassifyResponse) -> SeenImage:
    """The verdict of a reply, and the image that it is about."""
    fetched = [
        f"data:{one.mime_type};base64,{base64.b64encode(one.data).decode()}" for one in reply.images
    ]
    return SeenImage(single_outcome(reply), fetched[0] if fetched else "")


def batch_request(items: Sequence[Item | Turns]) -> guard_pb2.ClassifyBatchRequest:
    """The wire's request; raises ValueError that names the item which is no conversation."""
    request = guard_pb2.ClassifyBatchRequest()
    for index, item in enumerate(items):
        try:
            one = classify_request(item if isinstance(item, Item) else Item(item))
        except ValueError as wrong:
            raise ValueError(f"items[{index}]: {wrong}") from None
        request.requests.append(one)
    return request


def single_outcome(reply: guard_pb2.ClassifyResponse) -> Outcome:
    """The verdict of a reply."""
    if not reply.HasField("verdict"):
        raise BadReply("the reply holds no verdict")
    return read_verdict(reply.verdict)


class Batch:
    """A batch under way: items that failed for the moment are asked again, the others are kept."""

    def __init__(self, request: guard_pb2.ClassifyBatchRequest) -> None:
        self._requests = request.requests
        self._waiting = list(range(len(request.requests)))
        self._results: dict[int, guard_pb2.ClassifyResult] = {}

    @property
    def request(self) -> guard_pb2.ClassifyBatchRequest:
        """The items to ask about."""
        return guard_pb2.ClassifyBatchRequest(requests=[self._requests[at] for at in self._waiting])

    def read(self, reply: guard_pb2.ClassifyBatchResponse) -> GuardError | None:
        """Keep what was answered; one of the errors after which asking again may help, if any."""
        if len(reply.results) != len(self._waiting):
            raise BadReply("the batch was answered with another number of results")
        errors = {}
        for at, result in zip(self._waiting, reply.results, strict=True):
            self._results[at] = result
            if result.HasField("error") and passing(error := from_item(result.error)):
                errors[at] = error
        self._waiting = list(errors)
        return next(iter(errors.values()), None)

    def outcomes(self, fallback: Fallback) -> list[Outcome | GuardError]:
        """One entry per item, in order; an item's own error stands where its verdict would."""
        return [
            _item_outcome(one, self._results[at], fallback) for at, one in enumerate(self._requests)
        ]

    def failed(self, error: GuardError, fallback: Fallback) -> list[Outcome | GuardError]:
        """The outcomes when a call failed as a whole: what was answered before stays.

        Raises where that was declared and nothing was answered.
        """
        if self._results:
            return self.outcomes(fallback)
        return [
            fallback.outcome(error, one.policy, direction_of(one.conversation))
            for one in self._requests
        ]


def _item_outcome(
    request: guard_pb2.ClassifyRequest, result: guard_pb2.ClassifyResult, fallback: Fallback
) -> Outcome | GuardError:
    try:
        found = read_result(result)
        if isinstance(found, guard_pb2.ItemError):
            raise from_item(found)
        return read_verdict(found)
    except GuardError as error:
        try:
            return fallback.outcome(error, request.policy, direction_of(request.conversation))
        except GuardError as raised:
            return raised


def start_step(turns: Turns, policy: str, language: str) -> guard_pb2.ClassifyStreamRequest:
    """The first step of a stream; raises ValueError for what is no conversation."""
    start = guard_pb2.StreamStart(conversation=read_turns(turns), policy=policy, language=language)
    return guard_pb2.ClassifyStreamRequest(start=start)


def piece_step(piece: Piece | str) -> guard_pb2.ClassifyStreamRequest:
    """A step that adds text."""
    piece = Piece(piece) if isinstance(piece, str) else piece
    step = guard_pb2.StreamPiece(text=piece.text, check=piece.check)
    return guard_pb2.ClassifyStreamRequest(piece=step)


def end_step() -> guard_pb2.ClassifyStreamRequest:
    """The last step of a stream."""
    return guard_pb2.ClassifyStreamRequest(piece=guard_pb2.StreamPiece(end=True))


class StreamReader:
    """Reads the replies of one stream and knows whether the last one has come."""

    def __init__(self) -> None:
        self._covered_chars = 0
        self._final = False

    def read(self, reply: guard_pb2.ClassifyStreamResponse) -> StreamOutcome:
        """The outcome of one reply; raises BadReply when coverage goes backwards."""
        if self._final or reply.covered_chars < self._covered_chars:
            raise BadReply("the stream's verdicts are out of order")
        outcome = StreamOutcome(read_verdict(reply.verdict), reply.covered_chars, reply.final)
        self._covered_chars, self._final = reply.covered_chars, reply.final
        return outcome

    def finish(self) -> None:
        """Raises BadReply when the stream ended without a verdict on the whole reply."""
        if not self._final:
            raise BadReply("the stream ended before the verdict on the whole reply")

    def failed(self, error: GuardError, policy: str, fallback: Fallback) -> StreamOutcome:
        """The last outcome of a stream that broke; raises where that was declared."""
        outcome = fallback.outcome(error, policy, Direction.RESPONSE)
        return StreamOutcome(outcome, self._covered_chars, final=True)
