"""Tenants: what each may ask for and how much, and how much of it is in use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from guard_service.errors import QuotaExceeded
from guard_service.security.quotas import Quota

CROWDED_RETRY_S = 0.25
INF = math.inf


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one tenant may use; infinite where nothing is said."""

    verdicts_per_s: float = INF
    burst: float = INF  # verdicts at once
    characters_per_minute: float = INF
    images_per_minute: float = INF
    calls: float = INF  # in progress, streams among them
    streams: float = INF  # in progress
    batch_items: float = INF


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who is served. `policies` is what it may name; None: all. `default_policy` may be empty."""

    name: str
    policies: frozenset[str] | None = None
    default_policy: str = ""
    bounds: Bounds = Bounds()


@dataclass(frozen=True, slots=True)
class Size:
    """What a verdict is charged."""

    characters: int
    images: int = 0


class Usage:
    """A tenant and what it uses now. Outlives a reload of the auth file. For one event loop."""

    def __init__(
        self,
        tenant: Tenant,
        on_refused: Callable[[str, str], None] = lambda tenant, quota: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_refused` is told the names of tenant and quota."""
        self.tenant = tenant
        self._on_refused = on_refused
        self.calls = 0
        self.streams = 0
        self._quotas = {name: Quota(*of, clock) for name, of in _rates(tenant.bounds).items()}

    @property
    def name(self) -> str:
        """The tenant's."""
        return self.tenant.name

    def become(self, tenant: Tenant) -> None:
        """Other terms from now on; what was used stays used."""
        self.tenant = tenant
        for name, (rate, burst) in _rates(tenant.bounds).items():
            self._quotas[name].bound(rate, burst)

    @contextmanager
    def call(self, stream: bool) -> Iterator[None]:
        """Count a call while it lasts; raises QuotaExceeded when there are enough."""
        bounds = self.tenant.bounds
        if self.calls >= bounds.calls:
            raise self._refused("calls", "too many calls in progress", CROWDED_RETRY_S)
        if stream and self.streams >= bounds.streams:
            raise self._refused("streams", "too many streams in progress", CROWDED_RETRY_S)
        self.calls += 1
        self.streams += stream
        try:
            yield
        finally:
            self.calls -= 1
            self.streams -= stream

    def wait_s(self, size: Size) -> tuple[float, str]:
        """Seconds until a verdict may be had, and for want of what; 0 when now."""
        waits = [(self._quotas[name].wait_s(much), name) for name, much in _amounts(size).items()]
        return max(waits, default=(0.0, ""))

    def charge(self, size: Size) -> None:
        """Take what a verdict costs; raises QuotaExceeded, and takes nothing, when it is over."""
        wait_s, what = self.wait_s(size)
        if wait_s > 0:
            raise self._refused(what, f"the tenant's quota of {what} is used up", wait_s)
        for name, much in _amounts(size).items():
            self._quotas[name].take(much)

    def _refused(self, quota: str, why: str, retry_after_s: float) -> QuotaExceeded:
        self._on_refused(self.name, quota)
        return QuotaExceeded(f"{why}; retry later", retry_after_s)


class Tenants:
    """All tenants of the auth file in use. For one event loop."""

    def __init__(
        self,
        on_refused: Callable[[str, str], None] = lambda tenant, quota: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_refused, self._clock = on_refused, clock
        self._usage: dict[str, Usage] = {}

    def become(self, tenants: Iterable[Tenant]) -> None:
        """Serve these from now on. Calls in progress end under the terms they began with."""
        wanted = {tenant.name: tenant for tenant in tenants}
        for name, tenant in wanted.items():
            if name in self._usage:
                self._usage[name].become(tenant)
            else:
                self._usage[name] = Usage(tenant, self._on_refused, self._clock)
        for name in self._usage.keys() - wanted.keys():
            del self._usage[name]

    def of(self, name: str) -> Usage:
        """The tenant of that name; KeyError when there is none."""
        return self._usage[name]

    @property
    def all(self) -> Mapping[str, Usage]:
        """By name."""
        return self._usage


def _rates(bounds: Bounds) -> dict[str, tuple[float, float]]:
    """Rate a second and burst of each quota; a minute's worth may come at once."""
    return {
        "verdicts": (bounds.verdicts_per_s, bounds.burst),
        "characters": (bounds.characters_per_minute / 60, bounds.characters_per_minute),
        "images": (bounds.images_per_minute / 60, bounds.images_per_minute),
    }


def _amounts(size: Size) -> dict[str, int]:
    amounts = {"verdicts": 1, "characters": size.characters, "images": size.images}
    return {name: much for name, much in amounts.items() if much}
