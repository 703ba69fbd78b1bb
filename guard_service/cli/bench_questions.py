"""Conversations of exactly so many tokens, made of harmless text, and each new."""

from __future__ import annotations

from dataclasses import replace

from guard_policies.taxonomy import BY_CODE
from guard_service.artifact import Artifact
from guard_service.cli.bench_run import SENTENCES
from guard_service.cli.peers import Question
from guard_service.conversation import Conversation
from guard_service.prompt import Prompt, PromptBuilder
from guard_service.tokenizer import load_tokenizer

_LONGEST = 1200  # sentences in a long turn, at most: more tokens than any window that is measured
_END = 2  # tokens of a turn's end that a shortened one keeps
_ASKED = "Tell me about the weather in the mountains, and what to wear."


class Questions:
    """Questions to an artifact; no two have a first word in common, as far as words go."""

    def __init__(self, artifact: Artifact, template: str = "") -> None:
        """`template` replaces the artifact's own. Raises ValueError when the artifact lacks what
        it needs."""
        manifest = artifact.manifest
        self.template = template or manifest.template
        self.window = manifest.window_tokens
        self._builder = PromptBuilder(
            load_tokenizer(artifact.tokenizer), self.template, self.window
        )
        self._categories = [BY_CODE[code] for code in manifest.categories]
        self._vocab = manifest.geometry.vocab
        self._made = 0
        known = self._ask(("user", _ASKED))
        if missing := set(known.categories) - manifest.verdict.codes.keys():
            raise ValueError(f"the artifact has no code for {min(missing)} of this template")
        self.prefix_tokens, self.closing_tokens = len(known.prefix), len(known.closing)

    def of(self, tokens: int, new_prefix: bool = False) -> Question:
        """A prompt with a conversation of `tokens`, at most a window.

        `new_prefix` changes a token near the prefix's beginning, so that nothing of it is known.
        """
        whole = self._ask(("user", self._text()))
        if not _END < tokens <= len(whole.body):
            raise ValueError(f"a conversation of {tokens} tokens does not fit the window")
        body = (*whole.body[: tokens - _END], *whole.body[-_END:])
        made = _question(replace(whole, body=body))
        if not new_prefix:
            return made
        first, _, *rest = made.prefix
        return replace(made, prefix=(first, self._made % self._vocab, *rest))

    def growing(self, reply_tokens: int, every: int) -> tuple[list[Question], int]:
        """A reply that is checked every so many tokens and at its end, and how long it is.

        It has `reply_tokens`, its label included, or what the window allows.
        """
        before = len(self._ask(("user", _ASKED)).body)
        whole = self._ask(("user", _ASKED), ("assistant", self._text()))
        length = min(reply_tokens, len(whole.body) - before - _END)
        ends = [*range(every, length, every), length]
        bodies = [(*whole.body[: before + end], *whole.body[-_END:]) for end in ends]
        made = [replace(_question(replace(whole, body=body)), of_response=True) for body in bodies]
        return made, length

    def _ask(self, *turns: tuple[str, str]) -> Prompt:
        return self._builder.build(Conversation.of(*turns), self._categories).prompts[0]

    def _text(self) -> str:
        """Text that fills the window; the sentences in another order each time."""
        first, self._made = self._made, self._made + 1
        count = min(_LONGEST, self.window)
        words = (SENTENCES[(first + at) % len(SENTENCES)] for at in range(count))
        return f"{_WORDS[first % len(_WORDS)]} {first}. " + " ".join(words)


_WORDS = ("Weather", "Trains", "Garden", "Cooking", "Music", "Books", "Travel", "History", "Bikes")


def _question(prompt: Prompt) -> Question:
    return Question(prompt.prefix, prompt.body, prompt.closing, prompt.categories)
