"""From a conversation to model input: the templates, at token level."""

from __future__ import annotations

from dataclasses import dataclass

from guard_policies.assessment import Direction


@dataclass(frozen=True, slots=True)
class Prompt:
    """One window of a conversation, ready for an engine: prefix + body + closing is the model input.

    The verdict is read behind the last token of `closing`. Engines append the verdict's own tokens.
    """

    direction: Direction
    prefix: tuple[int, ...]  # tokens up to the conversation: equal for all prompts of a policy and role
    body: tuple[int, ...]  # tokens of this window of the conversation
    closing: tuple[int, ...]  # tokens from the conversation's end to where the verdict is read
