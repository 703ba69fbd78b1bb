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

    def find(self, method: str, path: str, root: str = "") -> Format | Rule:
        """The format that reads the request, or the rule for it.

        Paths are compared as a lenient server might read them: a request must not get round the
        guard by a path that only the guard takes for another. Of a path below `root` the
        application reads what is behind it.
        """
        path, method = _below(path, root), method.upper()
        plain = normal(path)
        owner = self._owner(plain)
        if method == "POST" and owner is not None:
            return owner
        if method == "OPTIONS":
            return Rule.UNTOUCHED
        rule = self._rule(path, plain, owned=owner is not None)
        if method in _SAFE_METHODS and any(_matches(plain, one) for one in PASSES):
            return Rule.UNTOUCHED if not self._odd(path) else rule
        return rule

    def find_socket(self, path: str, root: str = "") -> Rule:
        """The rule for a web socket: no format reads any."""
        path = _below(path, root)
        plain = normal(path)
        return self._rule(path, plain, owned=self._owner(plain) is not None)

    def _owner(self, plain: str) -> Format | None:
        return next(
            (one for one in self.formats if any(_matches(plain, path) for path in one.paths)), None
        )

    def _rule(self, path: str, plain: str, owned: bool) -> Rule:
        if self._odd(path):
            return self.unknown
        if any(_matches(plain, one) for one in self.passes):
            return Rule.UNTOUCHED
        return self.unknown if owned or self._guarded(plain) else Rule.UNTOUCHED

    def _odd(self, path: str) -> bool:
        return _ODD.search(path) is not None and self._names_guarded(path)

    def _guarded(self, plain: str) -> bool:
        return any(
            one == "/" or plain == one or plain.startswith(f"{one}/") for one in self.guarded
        )

    def _names_guarded(self, path: str) -> bool:
        """Whether an odd path leads to a guarded one in anybody's reading."""
        segments = _SEPARATORS.sub("/", f"/{_unescaped(path)}/")
        return any(one == "/" or f"{one}/" in segments for one in self.guarded)


def _below(path: str, root: str) -> str:
    root = root.rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


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
    return Routes(tuple(formats), tuple(map(normal, guarded)), tuple(map(normal, passes)), rule)
