"""A policy, resolved: for each direction and language one rule per judged category."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from guard_policies.assessment import Action, Direction
from guard_policies.taxonomy import BY_CODE, Category

ANY_ENGINE = "any"
DEFAULT_THRESHOLD = 0.5  # Llama Guard 3 answers "unsafe" at P(unsafe) >= 0.5
MIN_THRESHOLD = 0.0001
DEFAULT_REFUSAL = "I can't help with that."
# Length that RFC 5646 (4.4.1) advises to provide for.
_LONGEST_TAG = 35


class Unscannable(Enum):
    """What is done with a message that has a part no model could read, mildest first."""

    ALLOW = "allow"
    FLAG = "flag"
    BLOCK = "block"
    ERROR = "error"

    @property
    def severity(self) -> int:
        """0 for ALLOW to 3 for ERROR."""
        return ("allow", "flag", "block", "error").index(self.value)


class Mode(Enum):
    """ENFORCE acts; SHADOW decides and reports as usual and lets everything pass."""

    ENFORCE = "enforce"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a category's score leads to. `threshold` lies in [MIN_THRESHOLD, 1]."""

    category: Category
    action: Action
    threshold: float


@dataclass(frozen=True, slots=True)
class Stream:
    """When a growing reply is judged, and what of it waits for the next verdict. Code points."""

    check_every_chars: int = 200  # whenever so many came since the last verdict
    first_check_chars: int = 40  # and the first one this early
    sentence_ends: bool = False  # and where a sentence ends
    hold_back_chars: int = 0  # of what a verdict allowed the last ones wait for the next verdict


@dataclass(frozen=True, slots=True)
class ImageUris:
    """From where images may be fetched: from nowhere without hosts."""

    hosts: tuple[str, ...] = ()  # names, or "*.example.org" for all names below that one
    ports: tuple[int, ...] = (443,)
    schemes: tuple[str, ...] = ("https",)


class WhenUnable(Enum):
    """What holds when the second guard cannot answer: the FIRST one's verdict, or an ERROR."""

    FIRST = "first"
    ERROR = "error"


Band = tuple[float, float]  # of scores, the lower one first


@dataclass(frozen=True, slots=True)
class Cascade:
    """When a second guard decides instead of the first. Scores lie in [0, 1].

    The second decides where the first's unsafe_score lies in the band of the direction that is
    judged (`bands`, both ends included; none for a direction that is not there), where
    its score of a category reaches that of `categories`, and, with `images`, wherever there is one.
    """

    second: str = ANY_ENGINE  # name of the engine or model that must be the second, or "any"
    bands: Mapping[Direction, Band] = field(default_factory=dict)
    categories: Mapping[str, float] = field(default_factory=dict)
    images: bool = True
    when_unable: WhenUnable = WhenUnable.ERROR
    timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """For which policy's place this one is tried, and its share of that one's conversations, in
    percent; what it does not decide it is compared on."""

    of: str
    share: float = 0.0


@dataclass(frozen=True)
class Policy:
    """What should happen with assessed messages. Made by the loader; immutable."""

    name: str
    version: str
    description: str
    digest: str  # "sha256:" and hex, over the policy's meaning
    mode: Mode
    engine: str  # name of the engine that must judge, or "any"
    categories: tuple[Category, ...]  # judged in at least one direction; S1..S14, then own ones
    stream: Stream
    # By direction and lower-case language tag; "" is the base. Never empty of ("", direction).
    tables: Mapping[tuple[Direction, str], tuple[Rule, ...]] = field(repr=False)
    unavailable: Mapping[Direction, Action] = field(repr=False)
    unscannable: Mapping[Direction, Unscannable] = field(repr=False)
    refusals: Mapping[str, str] = field(repr=False)  # by lower-case tag; "" is the base
    cascade: Cascade | None = None
    image_uris: ImageUris = ImageUris()
    candidate: Candidate | None = None  # not part of the digest: it changes no decision

    @property
    def custom(self) -> bool:
        """Whether it brings categories or wording that models were not trained on."""
        return any(BY_CODE.get(category.code) != category for category in self.categories)

    @property
    def languages(self) -> tuple[str, ...]:
        """Tags that have thresholds or actions of their own, in lower case, sorted."""
        return tuple(sorted({tag for _, tag in self.tables if tag}))

    def rules(self, direction: Direction, language: str = "") -> tuple[Rule, ...]:
        """One rule per category judged in this direction, in the order of `categories`.

        A language without rules of its own has those of the next wider tag ("pt-BR", "pt", base).
        The rules' categories are the same for all languages. Empty when all are off.
        """
        for tag in widening(language):
            if (found := self.tables.get((direction, tag))) is not None:
                return found
        return ()

    def judged(self, direction: Direction) -> tuple[Category, ...]:
        """The categories to ask the model about in this direction; empty when all are off."""
        return tuple(rule.category for rule in self.rules(direction))

    def on_unavailable(self, direction: Direction) -> Action:
        """What callers should do when there is no verdict; always ALLOW in shadow mode."""
        return Action.ALLOW if self.mode is Mode.SHADOW else self.unavailable[direction]

    def on_unscannable(self, direction: Direction) -> Unscannable:
        """What a part that no model could read leads to."""
        return self.unscannable[direction]

    def as_second(self) -> Policy:
        """What the second guard of its cascade serves: the same rules and digest, by itself."""
        if self.cascade is None:
            return self
        return replace(self, engine=self.cascade.second, cascade=None)

    def refusal(self, language: str = "") -> str:
        """The text shown instead of a blocked message, in the language or the nearest there is."""
        return next(self.refusals[tag] for tag in widening(language) if tag in self.refusals)


def normal_tag(language: str) -> str:
    """The tag in the spelling that policies are looked up by: lower case, hyphens."""
    return language.strip().replace("_", "-").lower()


def widening(language: str) -> Iterator[str]:
    """The tag and its ever wider ranges, at last "" (RFC 4647, 3.4: lookup)."""
    tag = normal_tag(language) if len(language) <= _LONGEST_TAG else ""
    while tag:
        yield tag
        tag = re.sub(r"(-[^-])?-[^-]*$", "", tag) if "-" in tag else ""
    yield ""
