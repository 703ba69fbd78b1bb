"""Which requests are screened, by which format, which pass unread, which are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

from guard_middleware.formats.contract import Format

# Health, models, metrics: nothing there was written by a model or is read by one.
PASSES = (
    *("/", "/health", "/healthz", "/livez", "/readyz", "/health/ready", "/health/live", "/ping"),
    *("/metrics", "/version", "/info", "/load", "/docs", "/redoc", "/openapi.json", "/favicon.ico"),
    *("/v1", "/v1/health", "/v1/version", "/v1/models", "/v1/models/*", "/v1/models/*/*"),
    *("/api/tags", "/api/version", "/api/ps", "/models"),
)
_SAFE_METHODS = ("GET", "HEAD")
# What servers disagree about.
_ODD = re.compile(r"[%\\;\x00-\x1f\x7f]|/\.\.?(/|$)")
_SEPARATORS = re.compile(r"[/\\;]+")


class Rule(Enum):
    """What is done with a request that no format reads."""

    UNTOUCHED = "untouched"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Routes:
    """The rules, for paths below an application's root."""

    formats: Sequence[Format]
    guarded: tuple[str, ...]
    passes: tuple[str, ...]
    unknown: Rule

    def find(self, method: str, path: str) -> Format | Rule:
        """The format that reads the request, or the rule for it.

        Paths are compared as a lenient server might read them: a request must not get round the
        guard by a path that only the guard takes for another.
        """
        plain = normal(path)
        if method == "POST":
            for one in self.formats:
                if any(_matches(plain, pattern) for pattern in one.paths):
                    return one
        if _ODD.search(path) and self._names_guarded(path):
            return self.unknown
        if method == "OPTIONS" or not self._guarded(plain):
            return Rule.UNTOUCHED
        if method in _SAFE_METHODS and any(_matches(plain, one) for one in PASSES):
            return Rule.UNTOUCHED
        if any(_matches(plain, one) for one in self.passes):
            return Rule.UNTOUCHED
        return self.unknown

    def _guarded(self, plain: str) -> bool:
        return any(
            one == "/" or plain == one or plain.startswith(f"{one}/") for one in self.guarded
        )

    def _names_guarded(self, path: str) -> bool:
        """Whether an odd path leads to a guarded one in anybody's reading."""
        segments = _SEPARATORS.sub("/", f"/{_unescaped(path)}/")
        return any(one == "/" or f"{one}/" in segments for one in self.guarded)


def normal(path: str) -> str:
    """The path in lower case, without doubled or trailing slashes, dots, parameters, escapes."""
    segments: list[str] = []
    for raw in _unescaped(path).replace("\\", "/").split("/"):
        segment = raw.partition(";")[0]
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    return "/" + "/".join(segments)


def _unescaped(path: str) -> str:
    for _ in range(3):  # escaped once more, in the hope that somebody decodes twice
        path = re.sub(r"%([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), path)
    return re.sub(r"[\x00-\x20\x7f]", "", path.casefold())


def _matches(plain: str, pattern: str) -> bool:
    return _compiled(pattern).fullmatch(plain) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """`*` is one segment, `**` any number of them."""
    wanted = re.escape(pattern).replace(r"/\*\*", "(?:/[^/]+)*").replace(r"\*", "[^/]+")
    return re.compile(wanted)


def routes(
    formats: Iterable[Format], guarded: tuple[str, ...], passes: tuple[str, ...], unknown: str
) -> Routes:
    """The rules that settings ask for."""
    rule = Rule.REFUSE if unknown == "refuse" else Rule.UNTOUCHED
    return Routes(tuple(formats), guarded, passes, rule)
