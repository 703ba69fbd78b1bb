"""Policies that may take another's place: compared with it on every verdict, given a share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from guard_policies.assessment import Action, Direction
from guard_policies.decide import decide
from guard_policies.schema import Policy
from guard_service.conversation import Conversation, Image, Message, Role, Text, ToolCall
from guard_service.engines import ModelCard
from guard_service.errors import PolicyNotSupported
from guard_service.matching import asked_of, unknown_to
from guard_service.metrics import Metrics
from guard_service.moderation import Judgement

NONE = "none"  # the action of a policy that could not decide
# How often two policies wished which actions, None being no decision.
Tally = Counter[tuple[Action | None, Action | None]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A policy and one that may take its place."""

    policy: Policy
    candidate: Policy

    @property
    def digests(self) -> tuple[str, str]:
        """What was compared: another one of them, and it is another comparison."""
        return self.policy.digest, self.candidate.digest


class Candidates:
    """Chooses who decides, and compares, from the same run of the model. For one event loop."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        card: ModelCard,
        metrics: Metrics,
        key: bytes = b"",
        before: Candidates | None = None,
    ) -> None:
        """`before` is who counted until now: what is compared as before is counted on. Raises
        PolicyNotSupported for a candidate that cannot be compared on this model."""
        self._policies = policies
        self._card = card
        self._metrics = metrics
        self._key = hashlib.sha256(key).digest()
        self._pairs: dict[str, list[Pair]] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}
        for name in sorted(policies):
            if (terms := policies[name].candidate) is None:
                continue
            pair = Pair(policies[terms.of], policies[name])
            if problem := incomparable(pair, card):
                raise PolicyNotSupported(problem)
            self._pairs.setdefault(terms.of, []).append(pair)
            counted = before._tallies.get(pair.digests) if before else None
            self._tallies[pair.digests] = Tally() if counted is None else counted

    def chosen(self, policy: Policy, conversation: Conversation) -> Policy:
        """The policy that decides: a candidate for its share of conversations, always the same one
        for the same beginning of a conversation."""
        pairs = self._pairs.get(policy.name)
        if pairs is None or policy is not self._policies.get(policy.name):
            return policy  # which may be what a second guard serves of it
        place = self._place(pairs, conversation)
        for pair in pairs:
            assert pair.candidate.candidate is not None
            place -= pair.candidate.candidate.share
            if place < 0:
                return pair.candidate
        return policy

    def compare(self, judgement: Judgement, language: str) -> None:
        """Count what both policies of each pair make of what the model found."""
        for pair in self._pairs_of(judgement.policy):
            is_candidate = judgement.policy is pair.candidate
            other = pair.policy if is_candidate else pair.candidate
            wishes = [_wish(judgement), self._wish_of(other, judgement, language)]
            action, candidate_action = reversed(wishes) if is_candidate else wishes
            self._tallies[pair.digests][action, candidate_action] += 1
            self._metrics.candidate_verdicts.labels(
                pair.policy.name, pair.candidate.name, _shown(action), _shown(candidate_action)
            ).inc()

    def tally(self, candidate: Policy) -> Mapping[tuple[Action | None, Action | None], int]:
        """How often the policy in use and this candidate for its place wished which actions."""
        pairs = self._pairs_of(candidate) if candidate.candidate else ()
        return next((self._tallies[pair.digests] for pair in pairs), {})

    def _pairs_of(self, policy: Policy) -> Iterator[Pair]:
        terms = policy.candidate
        for pair in self._pairs.get(terms.of if terms else policy.name, ()):
            if policy is (pair.candidate if terms else pair.policy):
                yield pair

    def _place(self, pairs: list[Pair], conversation: Conversation) -> float:
        """From 0 to 100, evenly spread, by what stays the same while a conversation grows."""
        digest = hashlib.blake2b(key=self._key, digest_size=8)
        names = (pairs[0].policy.name, *(pair.candidate.name for pair in pairs))
        for word in (*names, *_beginning(conversation)):
            data = word.encode("utf-8", "surrogatepass") if isinstance(word, str) else word
            digest.update(len(data).to_bytes(8, "big") + data)
        return int.from_bytes(digest.digest(), "big") / 2**64 * 100

    def _wish_of(self, policy: Policy, judgement: Judgement, language: str) -> Action | None:
        """What a policy that was not asked would have said; None where it has no decision."""
        built = judgement.built
        unscannable = not all(part.judged for part in built.parts)
        unasked = dict.fromkeys(unknown_to(policy, self._card, built.direction), 0.0)
        wishes = []
        for found in judgement.assessments:
            scores = {**unasked, **found.category_scores}
            try:
                decision = decide(
                    policy,
                    type(found)(found.unsafe_score, scores),
                    built.direction,
                    language,
                    unscannable,
                )
            except ValueError:
                return None
            wishes.append(decision.shadow_action or decision.action)
        return max(wishes, key=lambda wish: wish.severity, default=None)


def incomparable(pair: Pair, card: ModelCard) -> str:
    """Why a candidate cannot be compared by what the model finds for the policy; empty if it can.

    The model must be asked the same: one run then holds what both of them need.
    """
    policy, candidate = pair.policy, pair.candidate
    why = ""
    if candidate.cascade != policy.cascade:
        why = "its cascade is another one"
    elif candidate.engine != policy.engine or candidate.image_uris != policy.image_uris:
        why = "its engine or image_uris are others"
    for direction in Direction:
        sides = [_asked(one, card, direction) for one in (policy, candidate)]
        if not why and sides[0] != sides[1]:
            why = f"the model would be asked something else about a {direction.value}"
    if not why:
        return ""
    return (
        f"policy {candidate.name} is a candidate for {policy.name} and cannot be compared: {why}; "
        "drop its `candidate`, and have requests name it"
    )


def key_of(path: Path | None) -> bytes:
    """The key of the choice; raises OSError."""
    return path.read_bytes().strip() if path is not None else b""


def _asked(policy: Policy, card: ModelCard, direction: Direction) -> object:
    """What tells the model's input, and where scores may be those of another server, the scores."""
    if card.custom_categories:
        return asked_of(policy, card, direction), bool(policy.judged(direction))
    judged = policy.judged(direction)
    return judged if policy.cascade is not None else bool(judged)


def _beginning(conversation: Conversation) -> Iterator[str | bytes]:
    """All up to the user's first message: later turns add nothing."""
    for message in conversation.messages:
        yield from _words(message)
        if message.role is Role.USER:
            return


def _words(message: Message) -> Iterator[str | bytes]:
    yield message.role.value
    for part in message.parts:
        match part:
            case Image():
                yield part.uri or part.data or b""
            case ToolCall():
                yield part.name
                yield part.arguments
            case Text():
                yield part.text
            case _:
                yield part.text


def _wish(judgement: Judgement) -> Action:
    return judgement.decision.shadow_action or judgement.decision.action


def _shown(action: Action | None) -> str:
    return action.value if action is not None else NONE
