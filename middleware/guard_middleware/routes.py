"""Which requests are screened, by which format, which pass unread, which are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

from guard_middleware.formats.contract import Format

_SAFE_METHODS = ("GET", "HEAD")

# Routes of the servers that no format reads. What passes for reading: health, models, metrics,
# settings. Nothing there was written by a model, or is read by one.
READ = (
    *("/", "/health", "/healthz", "/livez", "/readyz", "/health/ready", "/health/live", "/ping"),
    *("/metrics", "/version", "/info", "/load", "/docs", "/redoc", "/openapi.json", "/favicon.ico"),
    *("/v1", "/v1/health", "/v1/version", "/v1/models", "/v1/models/*", "/v1/models/*/*"),
    *("/api/tags", "/api/version", "/api/ps", "/models", "/props", "/lora-adapters"),
    "/is_sleeping",
)
# What passes for POST: only numbers come back, or the caller's own text, or a model's card.
POST = (
    *("/tokenize", "/detokenize", "/apply-template", "/chat_tokenize", "/api/show"),
    *("/v1/embeddings", "/embeddings", "/embedding", "/api/embed", "/api/embeddings", "/v2/embed"),
    *("/score", "/v1/score", "/rerank", "/reranking", "/v1/rerank", "/v1/reranking", "/v2/rerank"),
    "/classify",
)
# What is guarded besides `guarded`: it changes a server, shows what others ask of it, or runs a
# model for answers that no format reads.
GUARDED = (
    *("/slots", "/slots/*", "/props", "/lora-adapters", "/models/load", "/models/unload"),
    *("/models/sse", "/cors-proxy", "/audio/transcriptions"),
    *("/sleep", "/wake_up", "/pause", "/resume", "/collective_rpc", "/abort_requests"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/scale_elastic_ep"),
    *("/update_weights", "/init_weight_transfer_engine", "/start_profile", "/stop_profile"),
    *("/server_info", "/tokenizer_info", "/pooling", "/generative_scoring"),
)
# What servers disagree about.
_ODD = re.compile(r"[%\\;\x00-\x1f\x7f]|/\.\.?(/|$)")
_SEPARATORS = re.compile(r"[/\\;]+")


class Rule(Enum):
    """What is done with a request that no format reads."""

    UNTOUCHED = "untouched"
    BARE = "bare"  # it passes without a body
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
        rule = self._rule(path, plain, owned=owner is not None)
        if rule is Rule.UNTOUCHED:
            return rule
        if method == "OPTIONS":  # a browser asks whether it may ask
            return Rule.BARE
        known = READ if method in _SAFE_METHODS else POST if method == "POST" else ()
        if any(_matches(plain, one) for one in known) and not self._odd(path):
            return Rule.UNTOUCHED if method == "POST" else Rule.BARE
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
        return any(_matches(plain, one) for one in GUARDED) or any(
            one == "/" or plain == one or plain.startswith(f"{one}/") for one in self.guarded
        )

    def _names_guarded(self, path: str) -> bool:
        """Whether an odd path leads to a guarded one in anybody's reading."""
        segments = _SEPARATORS.sub("/", f"/{_unescaped(path)}/")
        return any(one == "/" or f"{one}/" in segments for one in (*self.guarded, *GUARDED))


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
