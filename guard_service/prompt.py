"""From a conversation to model input: the templates, at token level."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

from tokenizers import Tokenizer

from guard_policies.assessment import Direction
from guard_policies.taxonomy import Category
from guard_service.chat_templates import ChatMessage, read
from guard_service.conversation import Conversation, Image
from guard_service.templates import BY_NAME, Control, Pieces, wording_of
from guard_service.tokenizer import encode
from guard_service.turns import (
    InvalidConversation,
    PartReport,
    Turn,
    direction_of,
    images_of,
    turns_of,
)
from guard_service.windows import overlap_of, spans

__all__ = ["BuiltPrompt", "InvalidConversation", "PartReport", "Prompt", "PromptBuilder"]

IMAGE_TOKEN_ID = 128256  # what the vision model reads, whatever id a tokenizer gives <|image|>
_READ = "\n\n"  # the model writes it before a verdict; behind it the verdict is read


@dataclass(frozen=True, slots=True)
class Prompt:
    """One window of a conversation: prefix + body + closing is the model input.

    The verdict is read behind the last token of `closing`. Engines append the verdict's own tokens.
    """

    direction: Direction
    prefix: tuple[int, ...]  # up to the conversation: equal for all prompts of a policy and role
    body: tuple[int, ...]  # tokens of this window of the conversation
    closing: tuple[int, ...]  # tokens from the conversation's end to where the verdict is read
    image: Image | None = None  # what the image token in `prefix` stands for
    categories: tuple[str, ...] = ()  # codes that the prefix lists, in order


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """A conversation made ready: judge every prompt, the worst counts."""

    prompts: tuple[Prompt, ...]
    windows: tuple[tuple[int, int], ...]  # of each prompt: its span of the conversation's tokens
    conversation_tokens: int
    direction: Direction
    parts: tuple[PartReport, ...]


class PromptBuilder:
    """Builds the prompts of one model; safe to share between threads.

    Control tokens come from the template only. Caller text is encoded as ordinary text, whatever it
    spells, and delimiters of the templates in it are defused (`delimiters`, `turns`).

    A conversation of more than `window_tokens` becomes several prompts, in order. Each later window
    begins with the label of the turn it starts in, shares a sixth with the one before, and a cut
    turn gets its end. A window that stops before the last turn is judged as the conversation that
    ends there, so its direction is that of the turn it stops in. Text added to the last turn leaves
    all windows but the last as they are. With several images there is a prompt for each image and
    window.

    The builder keeps `tokenizer` and sets it to read special tokens as text.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, window_tokens: int) -> None:
        """Raises ValueError for an unknown template, a tokenizer without its control tokens, or a
        window too small to move on in."""
        if template not in BY_NAME:
            raise ValueError(f"unknown template {template!r}; known: {', '.join(BY_NAME)}")
        self.template = BY_NAME[template]
        self.window_tokens = window_tokens
        self._tokenizer = tokenizer
        self._control = _control_ids(tokenizer)
        self._special = frozenset(tokenizer.get_added_tokens_decoder()) | {IMAGE_TOKEN_ID}
        tokenizer.encode_special_tokens = True
        self._heads = {way: tuple(self._ids(f"{self.template.label(way)}:")) for way in Direction}
        self._tail = tuple(self._ids("\n\n"))
        spare = len(self._tail) + max(map(len, self._heads.values())) + overlap_of(window_tokens)
        if window_tokens < 2 * spare:
            raise ValueError(f"a window of {window_tokens} tokens is too small")
        self._closing = {way: self._encode(self._closing_pieces(way)) for way in Direction}
        self._prefix = lru_cache(maxsize=1024)(self._encode_prefix)

    def prefix(
        self, direction: Direction, categories: Sequence[Category], image: bool = False
    ) -> tuple[int, ...]:
        """Tokens up to the conversation; the same tuple for the same arguments.

        A template with a fixed list ("llama-guard-3-8b", "compact-fixed") ignores `categories`.
        """
        return self._prefix(direction, tuple(wording_of(categories).items()), image)

    def build(
        self,
        conversation: Conversation,
        categories: Sequence[Category],
        direction: Direction | None = None,
    ) -> BuiltPrompt:
        """Every prompt to judge. `direction` overrides what the last message's role says.

        Raises InvalidConversation for a conversation without messages or with lone surrogates.
        """
        own_direction = direction_of(conversation)
        judged = direction or own_direction
        sees = self.template.sees_images
        turns, parts = turns_of(conversation, self.template.trims, sees)
        encoded = [self._turn(turn) for turn in turns]
        cut = self._windows(turns, encoded, judged)
        codes = self.template.codes(categories)
        images: Sequence[Image | None] = (sees and images_of(conversation)) or (None,)
        prompts = tuple(
            Prompt(
                way,
                self.prefix(way, categories, image is not None),
                body,
                self._closing[way],
                image,
                codes,
            )
            for image in images
            for _, way, body in cut
        )
        windows = tuple(span for span, _, _ in cut) * len(images)
        return BuiltPrompt(prompts, windows, sum(map(len, encoded)), judged, tuple(parts))

    def chat_template(
        self,
        messages: Sequence[ChatMessage],
        categories: Mapping[str, str] | None = None,
        excluded_category_keys: Collection[str] = (),
    ) -> tuple[int, ...]:
        """The published chat template, token for token, for parity; raises ChatTemplateError.

        Against `build`: nothing is defused, roles must alternate, each text part has a line of its
        own, what the template loses is lost, there are no windows, and the prompt ends where the
        template ends. The tokens behind that are `build`'s: both encode the same way.
        """
        reading = read(self.template, messages, categories, excluded_category_keys)
        prefix = self.template.prefix(reading.target, reading.wording, reading.image)
        body = chain.from_iterable(self._ordinary(line) for line in reading.lines)
        closing = self.template.closing(reading.target)
        return (*self._encode(prefix), *body, *self._encode(closing))

    def _windows(
        self, turns: Sequence[Turn], encoded: Sequence[list[int]], judged: Direction
    ) -> list[tuple[tuple[int, int], Direction, tuple[int, ...]]]:
        """Span, direction and tokens of each window."""
        ids = tuple(chain.from_iterable(encoded))
        if len(ids) <= self.window_tokens:
            return [((0, len(ids)), judged, ids)]
        ends = list(accumulate(map(len, encoded)))
        starts = [0, *ends[:-1]]
        heads = [self._heads[turn.direction] for turn in turns]
        cut = []
        for start, end in spans(
            starts, [len(head) for head in heads], len(ids), self.window_tokens, len(self._tail)
        ):
            first = bisect_right(starts, start) - 1
            last = bisect_left(ends, end)
            head = () if starts[first] == start else heads[first]
            tail = () if ends[last] == end else self._tail
            way = judged if last == len(turns) - 1 else turns[last].direction
            cut.append(((start, end), way, head + ids[start:end] + tail))
        return cut

    def _turn(self, turn: Turn) -> list[int]:
        return self._ordinary(self.template.turn(turn.direction, turn.text))

    def _ordinary(self, text: str) -> list[int]:
        ids = self._ids(text)
        if not self._special.isdisjoint(ids):
            raise InvalidConversation("the tokenizer reads a control token in ordinary text")
        return ids

    def _closing_pieces(self, direction: Direction) -> Pieces:
        pieces = self.template.closing(self.template.label(direction))
        return pieces if pieces[-1] == _READ else (*pieces, _READ)

    def _encode_prefix(
        self, direction: Direction, wording: tuple[tuple[str, str], ...], image: bool
    ) -> tuple[int, ...]:
        label = self.template.label(direction)
        return self._encode(self.template.prefix(label, dict(wording), image))

    def _encode(self, pieces: Pieces) -> tuple[int, ...]:
        ids: list[int] = []
        for piece in pieces:
            ids += self._ids(piece) if isinstance(piece, str) else [self._control[piece]]
        return tuple(ids)

    def _ids(self, text: str) -> list[int]:
        try:
            return encode(self._tokenizer, text)
        except ValueError as error:
            raise InvalidConversation(str(error)) from error


def _control_ids(tokenizer: Tokenizer) -> dict[Control, int]:
    ids = {Control.IMAGE: IMAGE_TOKEN_ID}
    for control in Control:
        if control is not Control.IMAGE:
            found = tokenizer.token_to_id(control.value)
            if found is None:
                raise ValueError(f"the tokenizer lacks the special token {control.value}")
            ids[control] = found
    return ids
