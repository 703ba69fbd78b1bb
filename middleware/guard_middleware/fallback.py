"""What is done with a message that could not be judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, get_args

from guard_middleware.errors import CouldNotJudge, GuardError
from guard_middleware.service_info import PolicyList, PolicySummary
from guard_middleware.verdict import PolicyRef, Unjudged
from guard_policies.assessment import Action, Direction

OnUnavailable = Literal["raise", "block", "flag", "allow", "policy"]

# What a client spends, at most, on asking beforehand what the policies declare.
LEARN_TIMEOUT_S = 1.0
LEARN_AGAIN_S = 1.0  # how long it does not ask again

_BY_NAME = {action.value: action for action in Action}


class Fallback:
    """Turns "could not judge" into what the caller declared. Thread-safe.

    Errors of the caller's own (malformed, unknown policy, no credentials) are always raised:
    content must not be able to choose its own way past a guard.
    """

    def __init__(self, choice: OnUnavailable, clock: Callable[[], float] = time.monotonic) -> None:
        if choice not in get_args(OnUnavailable):
            raise ValueError(f"on_unavailable is none of {', '.join(get_args(OnUnavailable))}")
        self.choice = choice
        self._clock = clock
        self._declared: dict[str, PolicySummary] = {}
        self._current = False
        self._not_before = -math.inf

    @property
    def wants_policies(self) -> bool:
        """Whether it would help to ask what the policies declare: at first, and after a change."""
        return self.choice == "policy" and not self._current and self._clock() >= self._not_before

    def learn(self, policies: PolicyList | None) -> None:
        """Remember what each policy declares for the day when the guard cannot be asked; None where
        it did not tell."""
        self._not_before = self._clock() + LEARN_AGAIN_S
        if policies is None:
            return
        self._declared = {policy.policy.name: policy for policy in policies.policies}
        if policies.default_policy in self._declared:
            self._declared[""] = self._declared[policies.default_policy]
        self._current = True

    def saw(self, policy: PolicyRef) -> None:
        """A verdict was by this policy: it may be another than that of its name was."""
        known = self._declared.get(policy.name)
        if known is None or known.policy.digest != policy.digest:
            self._current = False

    def declared(self, policy: str) -> PolicySummary | None:
        """What a policy declares, "" being the default one; None where that is not known."""
        return self._declared.get(policy)

    def outcome(self, error: GuardError, policy: str, direction: Direction) -> Unjudged:
        """The outcome in place of a verdict; raises `error` where that was declared."""
        if self.choice == "raise" or not isinstance(error, CouldNotJudge):
            raise error
        return Unjudged(self._action(error, policy, direction), error.reason, error)

    def _action(self, error: GuardError, policy: str, direction: Direction) -> Action:
        if self.choice != "policy":
            return _BY_NAME[self.choice]
        spoken = error.on_unavailable.lower().removeprefix("action_")
        if spoken in _BY_NAME:
            return _BY_NAME[spoken]
        declared = self.declared(policy)
        if declared is None:
            return Action.BLOCK
        if direction is Direction.PROMPT:
            return declared.on_unavailable_prompt
        return declared.on_unavailable_response
