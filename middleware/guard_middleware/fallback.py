"""What is done with a message that could not be judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from guard_middleware.errors import CouldNotJudge, GuardError
from guard_middleware.service_info import PolicyList
from guard_middleware.verdict import Unjudged
from guard_policies.assessment import Action, Direction

OnUnavailable = Literal["raise", "block", "flag", "allow", "policy"]

# What a client spends, at most, on asking beforehand what the policies declare.
LEARN_TIMEOUT_S = 1.0

_BY_NAME = {action.value: action for action in Action}


class Fallback:
    """Turns "could not judge" into what the caller declared. Thread-safe.

    Errors of the caller's own (malformed, unknown policy, no credentials) are always raised:
    content must not be able to choose its own way past a guard.
    """

    def __init__(self, choice: OnUnavailable) -> None:
        if choice not in get_args(OnUnavailable):
            raise ValueError(f"on_unavailable is none of {', '.join(get_args(OnUnavailable))}")
        self.choice = choice
        self._declared: Mapping[tuple[str, Direction], Action] = {}

    @property
    def wants_policies(self) -> bool:
        """Whether it would help to know what the policies declare, and it is not known yet."""
        return self.choice == "policy" and not self._declared

    def learn(self, policies: PolicyList) -> None:
        """Remember what each policy declares for the day when the guard cannot be asked."""
        declared: dict[tuple[str, Direction], Action] = {}
        for policy in policies.policies:
            names = {policy.policy.name}
            if policy.policy.name == policies.default_policy:
                names.add("")
            for name in names:
                declared[name, Direction.PROMPT] = policy.on_unavailable_prompt
                declared[name, Direction.RESPONSE] = policy.on_unavailable_response
        self._declared = declared

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
        return self._declared.get((policy, direction), Action.BLOCK)
