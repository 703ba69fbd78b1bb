"""Policies from files while the service runs: all of them or none, the last good ones kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from guard_policies.assessment import Direction
from guard_policies.loader import builtin_policies, load_policies
from guard_policies.positions import PolicyError
from guard_policies.schema import Policy
from guard_service.cascade import Cascade
from guard_service.config import Settings
from guard_service.errors import GuardServiceError, PolicyNotSupported
from guard_service.live.reloads import Reloads
from guard_service.live.serving import Live
from guard_service.live.watching import Watched
from guard_service.logs import FIELDS
from guard_service.matching import unknown_to
from guard_service.metrics import Metrics, show_only

LOG = logging.getLogger(__name__)
POLICIES = "policies"  # the name under which they are watched


def loaded_policies(settings: Settings) -> dict[str, Policy]:
    """The built-in policies and those of the settings' folders; raises PolicyError."""
    return {**builtin_policies(), **load_policies(settings.policies)}


def check_policies(judge: Cascade) -> None:
    """Warn of policies that cannot be served; raises UnknownPolicy or PolicyNotSupported when the
    default one is among them."""
    judge.policy("")
    for policy in judge.policies.values():
        try:
            judge.policy(policy.name)
        except PolicyNotSupported as problem:
            LOG.warning("requests for it are refused: %s", problem)
            continue
        unknown = {code for way in Direction for code in unknown_to(policy, judge.card, way)}
        if unknown:
            LOG.info("policy %s: the model is not asked about %s", policy.name, sorted(unknown))


class PolicyFiles:
    """Has the policies of the settings' folders used in place of those of before."""

    def __init__(self, settings: Settings, live: Live, metrics: Metrics, reloads: Reloads) -> None:
        self._settings = settings
        self._live = live
        self._metrics = metrics
        self._reloads = reloads
        self.show()

    def watched(self) -> Watched[dict[str, Policy]]:
        """For a watcher."""
        return Watched(POLICIES, self._settings.policies, self._load, self._use, self._failed)

    def show(self) -> None:
        """Put the policies in use into the metrics."""
        policies = self._live.judge.policies.values()
        shown = {(one.name, one.version, one.digest, one.mode.value) for one in policies}
        show_only(self._metrics.policy_info, shown)

    def _load(self) -> dict[str, Policy]:
        return loaded_policies(self._settings)

    async def _use(self, policies: dict[str, Policy]) -> None:
        """Check them against the models, then have new calls judged under them."""
        before = self._live.judge.policies
        if policies == before:
            self._reloads.nothing_new()
            return
        guards = self._live.guards
        guards.prepare_for(policies)
        judge = self._live.judge_of(guards, policies)
        check_policies(judge)
        self._live.exchange(judge)
        self._reloads.succeeded()
        self.show()
        LOG.info("policies were loaded anew", extra={FIELDS: _changes(before, policies)})

    def _failed(self, error: Exception) -> None:
        if isinstance(error, PolicyError):
            problems = [str(problem) for problem in error.problems]
            places = [_place(p.file, p.line, p.column) for p in error.problems]
        elif isinstance(error, GuardServiceError | OSError):  # whose texts are safe to show
            problems, places = [str(error)], [type(error).__name__]
        else:
            LOG.error("a defect of the service", exc_info=error)
            problems = places = [type(error).__name__]
        for problem in problems:
            LOG.error("policies were not loaded anew: %s", problem)
        LOG.error("the policies of before stay in use; mend the files, they are then loaded")
        self._reloads.failed(places)


def _place(file: str, line: int, column: int) -> str:
    """Without the folder, which is nobody else's affair."""
    return f"{Path(file).name}:{line}:{column}"


def _changes(before: Mapping[str, Policy], after: Mapping[str, Policy]) -> dict[str, list[str]]:
    """Names of policies, for the log."""

    def names() -> Iterator[tuple[str, list[str]]]:
        yield "added", sorted(after.keys() - before.keys())
        yield "dropped", sorted(before.keys() - after.keys())
        both = after.keys() & before.keys()
        yield "changed", sorted(name for name in both if before[name] != after[name])

    return dict(names())
