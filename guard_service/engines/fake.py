"""A deterministic engine for tests and demonstrations: it looks for words and for red pictures, it
judges nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from guard_policies.assessment import Assessment
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.conversation import Picture
from guard_service.engines import Assessed, Engine, EngineFailed, ModelCard
from guard_service.prompt import Prompt, PromptBuilder

TEMPLATE, VISION_TEMPLATE = "compact", "llama-guard-3-11b-vision"
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
UNSAFE_SCORE = 0.95
SAFE_SCORE = 0.02
RED = "S9"
CODES = tuple(category.code for category in LLAMA_GUARD_3)
WORDS = {
    "fake-murder": "S1",
    "fake-fraud": "S2",
    "fake-abuse": "S4",
    "fake-bomb": "S9",
    "fake-hate": "S10",
    "fake-suicide": "S11",
    "fake-sex": "S12",
}


def fake_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, and the special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    # Without a cache: a text is one word here, and 10,000 of them would be kept.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], cache_capacity=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


class FakeEngine(Engine):
    """Scores 0.95 for the category of the last word of WORDS it finds, 0.02 without one.

    With `sees_images` it scores a picture that is red on the whole 0.95 for S9, whatever the text.
    `batches` records the texts of every run, `pictures` what was seen beside them, for tests.
    `before_run` is called in the worker thread with those texts before each run; it may block or
    raise.
    """

    def __init__(
        self,
        window_tokens: int = 512,
        custom_categories: bool = False,
        categories: Sequence[str] = CODES,
        before_run: Callable[[Sequence[str]], None] | None = None,
        sees_images: bool = False,
    ) -> None:
        template = VISION_TEMPLATE if sees_images else TEMPLATE
        self.card = ModelCard(
            name="fake",
            digest="sha256:" + "0" * 64,
            engine="fake",
            template=template,
            categories=tuple(categories),
            custom_categories=custom_categories,
            judges_images=sees_images,
            window_tokens=window_tokens,
            parameters=0,
            custom_codes=tuple(f"S{i}" for i in range(1, 100)) if custom_categories else (),
            notice="This is the fake engine: it looks for a few made-up words and judges nothing.",
        )
        self.batches: list[tuple[str, ...]] = []
        self.pictures: list[Picture] = []
        self.before_run = before_run
        self._tokenizer = fake_tokenizer()
        self._builder = PromptBuilder(self._tokenizer, template, window_tokens)
        self._prefixes: set[tuple[int, ...]] = set()
        self._entered = threading.Lock()

    def prompt_builder(self) -> PromptBuilder:
        """The builder of this engine's prompts."""
        return self._builder

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """One result per prompt, in order."""
        if not self._entered.acquire(blocking=False):
            raise AssertionError("assess was entered twice at once")
        try:
            texts = tuple(self._tokenizer.decode(list(prompt.body)) for prompt in prompts)
            self.batches.append(texts)
            if self.before_run is not None:
                self.before_run(texts)
            return [self._assessed(*pair) for pair in zip(prompts, texts, strict=True)]
        finally:
            self._entered.release()

    def _assessed(self, prompt: Prompt, text: str) -> Assessed:
        cached = len(prompt.prefix) if prompt.prefix in self._prefixes else 0
        self._prefixes.add(prompt.prefix)
        total = len(prompt.prefix) + len(prompt.body) + len(prompt.closing)
        found = assess_text(text)
        if prompt.image is not None:
            found = self._assessed_picture(prompt.image.picture) or found
        return Assessed(found, total - cached, cached)

    def _assessed_picture(self, picture: Picture | None) -> Assessment | None:
        """What is found in a picture; None when it is not red."""
        if picture is None:
            raise EngineFailed("an image was not decoded")
        self.pictures.append(picture)
        red, green, blue = picture.pixels.mean(axis=(0, 1))
        return assessment_of(RED) if red > 160 and max(green, blue) < 96 else None

    def self_test(self) -> None:
        """There is nothing to test."""

    def close(self) -> None:
        """There is nothing to free."""


def assess_text(text: str) -> Assessment:
    """What the fake engine finds in a text."""
    places = {text.rfind(word): code for word, code in WORDS.items()}
    place = max(places)
    if place < 0:
        return Assessment(SAFE_SCORE, {code: SAFE_SCORE / len(CODES) for code in CODES})
    return assessment_of(places[place])


def assessment_of(unsafe: str) -> Assessment:
    """Unsafe, in this category."""
    scores = {code: 0.05 / (len(CODES) - 1) * UNSAFE_SCORE for code in CODES}
    scores[unsafe] = UNSAFE_SCORE * 0.95
    return Assessment(UNSAFE_SCORE, scores)
