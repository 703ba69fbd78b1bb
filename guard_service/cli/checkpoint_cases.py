"""What `guardctl bench engine` asks of a checkpoint: conversations, and what was judged before.

Every case is new each time it is made: words and pictures that no cache has seen, but for those
that the case is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from guard_policies.taxonomy import BY_CODE, LLAMA_GUARD_3, Category
from guard_service.cli.bench_run import SENTENCES
from guard_service.conversation import Conversation, Image, Message, Picture, Role, Text
from guard_service.engines import Engine
from guard_service.prompt import Prompt

SHORT, LONG = 40, 640  # tokens of a conversation
_END = 2  # of a turn, which a shortened one keeps
_REPLY = 32  # tokens between two checks of a growing reply


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt to judge, and those that were judged before it, in order.

    With `grows` each of them is a step of one growing conversation, which the engine has as such.
    """

    before: tuple[Prompt, ...]
    prompt: Prompt
    grows: bool = False


class Cases:
    """Makes cases for an engine."""

    def __init__(self, engine: Engine, tile: int, tiles: int) -> None:
        """`tile` is the side of an image's tile in pixels, of which the largest image has `tiles`;
        0 for a model that sees none."""
        self._builder = engine.prompt_builder()
        self._window = engine.card.window_tokens
        self._own = tuple(BY_CODE[code] for code in engine.card.categories)
        codes = set(engine.card.custom_codes)
        self._other = tuple(one for one in LLAMA_GUARD_3[1:] if one.code in codes)
        self._tile, self._tiles = tile, tiles
        self._made = 0

    def named(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """Every case that this model can be asked, by what it is."""
        long = min(LONG, self._window)
        yield f"text of {SHORT} tokens", lambda: self._text(SHORT)
        if long > SHORT:
            yield f"text of {long} tokens", lambda: self._text(long)
        if self._other:
            yield "the same text, second policy", self._text_again
        yield f"a reply that grew by {_REPLY} tokens", lambda: self._reply(None)
        if not self._tiles:
            return
        yield "image, never seen, one tile", lambda: self._shown(self._picture(1))
        all_tiles = f"{self._tiles} tiles"
        yield f"image, never seen, {all_tiles}", lambda: self._shown(self._picture(self._tiles))
        yield "image seen again, other words", self._seen_again
        if self._other:
            yield "image seen again, second policy", self._second_policy
        yield "third turn, image in the first", self._third_turn
        yield (
            f"a reply that grew by {_REPLY}, with image",
            lambda: self._reply(self._picture(self._tiles)),
        )

    def batch(self, size: int, pictures: int) -> list[Prompt]:
        """Prompts for one batch: of text, or each with one of so many new pictures."""
        shown = [self._picture(1) for _ in range(pictures)]
        return [self._ask(SHORT, shown[at % pictures] if pictures else None) for at in range(size)]

    def _text(self, tokens: int) -> Case:
        return Case((self._ask(SHORT),), self._ask(tokens))

    def _text_again(self) -> Case:
        first = self._ask(SHORT)
        prefix = self._builder.prefix(first.direction, self._other)
        codes = tuple(one.code for one in self._other)
        return Case((first,), replace(first, prefix=prefix, categories=codes))

    def _shown(self, picture: Picture) -> Case:
        return Case((self._ask(SHORT),), self._ask(SHORT, picture))

    def _seen_again(self) -> Case:
        picture = self._picture(self._tiles)
        return Case((self._ask(SHORT, picture),), self._ask(SHORT, picture))

    def _second_policy(self) -> Case:
        picture = self._picture(self._tiles)
        first = self._ask(SHORT, picture)
        return Case((first,), self._ask(SHORT, picture, self._other))

    def _third_turn(self) -> Case:
        """User, assistant, user: each turn was judged when it came."""
        texts = [self._words() for _ in range(3)]
        picture = self._picture(self._tiles)
        turns = [self._built(texts[: count + 1], picture, self._own) for count in range(3)]
        return Case(tuple(turns[:2]), turns[2])

    def _reply(self, picture: Picture | None) -> Case:
        """A reply that has grown by some tokens since it was judged last."""
        length = self._window // 2
        whole = self._built([self._words(), self._long(length)], picture, self._own)
        now, earlier = (_cut(whole, tokens) for tokens in (length, length - _REPLY))
        return Case((earlier,), now, grows=True)

    def _ask(
        self,
        tokens: int,
        picture: Picture | None = None,
        categories: tuple[Category, ...] = (),
    ) -> Prompt:
        """A user's turn of exactly so many tokens."""
        return _cut(self._built([self._long(tokens)], picture, categories or self._own), tokens)

    def _built(
        self, texts: list[str], picture: Picture | None, categories: tuple[Category, ...]
    ) -> Prompt:
        """The first window of a conversation whose image, if any, stands in its first turn."""
        roles = (Role.USER, Role.ASSISTANT)
        turns = [Message(roles[at % 2], (Text(text),)) for at, text in enumerate(texts)]
        if picture is not None:
            turns[0] = Message(Role.USER, (Image(picture=picture), *turns[0].parts))
        return self._builder.build(Conversation(tuple(turns)), categories).prompts[0]

    def _words(self) -> str:
        self._made += 1
        return f"{self._made}. {SENTENCES[self._made % len(SENTENCES)]}"

    def _long(self, tokens: int) -> str:
        """Text of at least so many tokens, whatever the tokenizer: none has more than 16 bytes."""
        text = self._words()
        while len(text) < 16 * tokens:
            text += f" {self._words()}"
        return text

    def _picture(self, tiles: int) -> Picture:
        """Noise, as wide or as square as fills so many tiles."""
        self._made += 1
        rows = 2 if tiles == 4 else 1
        shape = (self._tile * rows, self._tile * max(tiles // rows, 1), 3)
        pixels = np.random.default_rng(self._made).integers(0, 256, shape, np.uint8)
        return Picture(f"bench {self._made}", pixels)


def _cut(prompt: Prompt, tokens: int) -> Prompt:
    """With a conversation of so many tokens."""
    return replace(prompt, body=(*prompt.body[: tokens - _END], *prompt.body[-_END:]))
