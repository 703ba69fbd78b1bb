"""Settings of the service: each knob, its default and its reason; flags, environment, file."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from guard_service.cgroups import ControlGroups

ENVIRONMENT_PREFIX = "GUARD_"
MIB = 1024 * 1024
_MESSAGE_BYTES = 4 * MIB  # of text alone
TARGET = re.compile(r"unix:/.+|[^\s/]+:[0-9]{1,5}")  # of another server


class ConfigError(ValueError):
    """Every mistake in the settings, one line each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _knob(default: Any, why: str, low: float = 0, high: float = float("inf")) -> Any:
    """A field with its reason and its bounds, both included (for numbers)."""
    return field(default=default, metadata={"why": why, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set. `Settings()` is a working server on this machine alone."""

    model: str = _knob("starter", '"starter", "fake" (for tests) or the path of a model folder')
    model_key: Path | None = _knob(
        None, "take only folders signed with this key (PEM, Ed25519 public; more than one may be)"
    )
    second_model: str = _knob(
        "", "second guard of cascades, in this process: as --model; policies say when it decides"
    )
    second_guard: str = _knob("", "second guard of cascades, on another server: host:port")
    second_guard_ca: Path | None = _knob(None, "its CA (PEM); without, the channel has no TLS")
    second_guard_cert: Path | None = _knob(
        None, "what we show it, where it asks for a client's certificate (PEM); with its key"
    )
    second_guard_key: Path | None = _knob(None, "private key of second_guard_cert (PEM)")
    host: str = _knob("127.0.0.1", "this machine only, until you say otherwise; or unix:/path")
    port: int = _knob(50051, "gRPC's usual port; 0 takes any free one", 0, 65535)
    metrics_host: str = _knob("127.0.0.1", "where /metrics, /livez and /readyz listen")
    metrics_port: int = _knob(9090, "Prometheus' usual port; 0 takes any free one", 0, 65535)
    metrics: bool = _knob(True, "serve /metrics, /livez and /readyz over HTTP")
    policies: tuple[Path, ...] = _knob((), "folders of policy files, besides those built in")
    default_policy: str = _knob("default", "the policy of requests that name none")
    threads: int = _knob(
        0, "threads of the engine; 0 takes one per core that this process may use", 0, 1024
    )
    lanes: int = _knob(0, "engine runs at once, which share the threads; 0: one per 8", 0, 256)
    device: str = _knob("auto", "cpu, cuda, or auto: CUDA where the model's library has it")
    kernel_plan: str = _knob("auto", "stored, int8, fp32, or auto: the fastest here, measured once")
    prepared: str = _knob(
        "auto", "folder that keeps graphs made ready; auto: the user's cache folder; none"
    )
    dtype: str = _knob(
        "auto", "of a checkpoint: bfloat16 (for CPUs with AMX), float32; auto: by device"
    )
    weights: str = _knob("stored", "of a checkpoint: stored, or int8 or int4 for smaller cards")
    image_cache_bytes: int = _knob(
        1024 * MIB, "of what a checkpoint has seen in images; 11B: 210 MiB for four tiles"
    )

    max_message_bytes: int = _knob(
        0,
        "one gRPC message; 0: 4 MiB, as gRPC has it, and where images are judged max_image_bytes "
        "more, so that the largest one comes through with its conversation",
        0,
        2**31 - 1,
    )
    max_batch_items: int = _knob(256, "bounds what one call can put in the queue", 1, 100_000)
    max_conversation_tokens: int = _knob(32_768, "some 100 pages; longer is refused", 1, 10_000_000)
    max_conversation_chars: int = _knob(
        524_288, "refused before tokenization, which takes time", 1, 2**31
    )
    max_messages: int = _knob(1_000, "turns of one conversation", 1, 1_000_000)
    max_parts: int = _knob(4_000, "parts of one conversation, all turns together", 1, 1_000_000)

    max_images: int = _knob(16, "images of one conversation; each is a run of the model", 1, 4_000)
    max_image_bytes: int = _knob(8 * MIB, "one encoded image, sent or fetched", 1, 2**31 - 1)
    max_image_pixels: int = _knob(16 * MIB, "one decoded image; phones take 12 million", 1, 2**28)
    image_bytes: int = _knob(1024 * MIB, "of all images that are decoded and not yet judged", 1)
    image_workers: int = _knob(2, "processes that decode, each one image at a time", 1, 64)
    image_timeout_s: float = _knob(10.0, "decoding one image; then its process is killed", 0.1, 300)
    fetch_timeout_s: float = _knob(5.0, "fetching one image, where a policy allows it", 0.1, 300)

    max_connections: int = _knob(
        16_384, "open at once; more are closed as they come, which clients try again", 1, 2**20
    )
    max_calls: int = _knob(1_024, "calls in progress; the rest is refused at once", 1, 1_000_000)
    max_call_bytes: int = _knob(256 * MIB, "bytes of all requests in progress", 1024)
    max_queue_items: int = _knob(1_024, "prompts waiting for the engine", 1, 1_000_000)
    max_queue_tokens: int = _knob(131_072, "tokens waiting for the engine", 1)
    batch_tokens: int = _knob(2_048, "tokens of one engine run, padding included", 1)
    batch_items: int = _knob(32, "prompts of one engine run", 1, 4_096)
    session_bytes: int = _knob(
        512 * MIB, "of all growing replies; one crowded out costs time; 0 keeps none"
    )

    candidate_key: Path | None = _knob(
        None, "file whose bytes nobody else knows, so that none can choose a candidate's side"
    )
    reload_s: float = _knob(
        5.0, "files that may change are looked at so often; 0: only on SIGHUP", 0, 86_400
    )
    default_deadline_s: float = _knob(30.0, "for calls that set none", 0.001, 86_400)
    max_deadline_s: float = _knob(300.0, "longer deadlines are cut to this", 0.001, 86_400)
    stream_idle_s: float = _knob(300.0, "a stream without a piece for so long ends", 0.001, 86_400)
    engine_timeout_s: float = _knob(
        120.0, "one engine run longer than this means that it hangs", 0.001
    )
    drain_timeout_s: float = _knob(25.0, "for accepted calls at shutdown; Kubernetes kills at 30")
    cache_entries: int = _knob(
        50_000, "verdicts remembered, about 2 KiB each; 0 turns it off", 0, 10**8
    )

    log_level: str = _knob("info", "debug, info, warning or error")
    log_format: str = _knob("auto", "json, text, or auto: text on a terminal")
    audit: Path | None = _knob(None, "folder of the audit log; one for each server, kept by you")
    audit_key: Path | None = _knob(None, "its key: openssl rand -hex 32; who has it can forge it")
    audit_payload_key: Path | None = _knob(
        None, "X25519 public key (PEM): what was judged is recorded too, sealed for its owner"
    )
    audit_failure: str = _knob("refuse", "an answer that cannot be recorded: refuse, or continue")
    audit_fsync: bool = _knob(True, "lines are on the disk before answers leave, not just written")
    audit_segment_bytes: int = _knob(64 * MIB, "of one file of it; then the next begins", 4096)
    tracing: bool = _knob(False, "spans to OpenTelemetry's collector; OTEL_* variables say where")
    tls_cert: Path | None = _knob(None, "certificate chain (PEM); with tls_key turns TLS on")
    tls_key: Path | None = _knob(None, "private key (PEM)")
    tls_client_ca: Path | None = _knob(None, "clients must show a certificate of this CA (PEM)")
    auth: Path | None = _knob(None, "who may call, and for how much (YAML); without: anyone")
    reflection: bool = _knob(True, "tell clients such as grpcurl what calls there are")

    def __post_init__(self) -> None:
        if problems := tuple(_problems(self)):
            raise ConfigError(problems)

    @property
    def address(self) -> str:
        """What the gRPC server binds."""
        if self.host.startswith("unix:"):
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def message_bytes(self, judges_images: bool) -> int:
        """The largest gRPC message that is taken."""
        most = _MESSAGE_BYTES + (self.max_image_bytes if judges_images else 0)
        return self.max_message_bytes or min(most, 2**31 - 1)

    def for_models(self, judges_images: bool) -> Settings:
        """With the size of a message that models want. Files are not looked at again: those that
        are gone by now are told of by whoever reads them."""
        settings = copy.copy(self)
        object.__setattr__(settings, "max_message_bytes", self.message_bytes(judges_images))
        return settings

    @property
    def engine_lanes(self) -> int:
        """Engine runs at once: as set, or one for each 8 threads; never more than threads."""
        threads = self._all_threads
        return min(self.lanes or max(threads // 8, 1), threads)

    @property
    def engine_threads(self) -> int:
        """Threads of one lane; of all, as many as set, or one per core this process may use.

        Cores are those of its affinity, or fewer where a container is limited to less time.
        """
        return self._all_threads // self.engine_lanes

    @property
    def _all_threads(self) -> int:
        return self.threads or ControlGroups().cores()

    @property
    def prepared_folder(self) -> Path | None:
        """Where graphs made ready are kept; the cache folder by the XDG base directory rules."""
        if self.prepared == "none":
            return None
        if self.prepared != "auto":
            return Path(self.prepared)
        named = os.environ.get("XDG_CACHE_HOME", "")
        home = Path(named) if named.startswith("/") else Path.home() / ".cache"
        return home / "llama-guard-service" / "prepared"


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
TYPES: dict[str, Any] = typing.get_type_hints(Settings)
CHOICES = {
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("auto", "json", "text"),
    "device": ("auto", "cpu", "cuda"),
    "kernel_plan": ("auto", "stored", "int8", "fp32"),
    "dtype": ("auto", "bfloat16", "float32"),
    "weights": ("stored", "int8", "int4"),
    "audit_failure": ("refuse", "continue"),
}


def _problems(settings: Settings) -> Iterator[str]:
    for name, knob in FIELDS.items():
        value = getattr(settings, name)
        if (
            TYPES[name] in (int, float)
            and not knob.metadata["low"] <= value <= knob.metadata["high"]
        ):
            low, high = knob.metadata["low"], knob.metadata["high"]
            yield f"{name}: {value} is not between {low} and {high}"
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            yield f"{name}: {getattr(settings, name)!r} is none of {', '.join(choices)}"
    if (settings.tls_cert is None) != (settings.tls_key is None):
        yield "tls_cert and tls_key go together: set both or neither"
    if settings.tls_client_ca and not settings.tls_cert:
        yield "tls_client_ca: needs tls_cert and tls_key too"
    if settings.second_model and settings.second_guard:
        yield "second_model and second_guard: a cascade has one second guard; set one of them"
    if settings.second_guard and not TARGET.fullmatch(settings.second_guard):
        yield f"second_guard: {settings.second_guard!r} is neither host:port nor unix:/path"
    if settings.second_guard_ca and not settings.second_guard:
        yield "second_guard_ca: needs second_guard too"
    if (settings.second_guard_cert is None) != (settings.second_guard_key is None):
        yield "second_guard_cert and second_guard_key go together: set both or neither"
    if settings.second_guard_cert and not settings.second_guard_ca:
        yield "second_guard_cert: needs second_guard_ca too; without it the channel has no TLS"
    if 0 < settings.max_message_bytes < 1024:
        yield f"max_message_bytes: {settings.max_message_bytes} is neither 0 nor at least 1024"
    if settings.audit and not settings.audit_key:
        yield "audit: needs audit_key too (openssl rand -hex 32 > FILE)"
    if settings.audit_payload_key and not settings.audit:
        yield "audit_payload_key: needs audit too"
    if settings.default_deadline_s > settings.max_deadline_s:
        yield "default_deadline_s: is over max_deadline_s"
    files = ("tls_cert", "tls_key", "tls_client_ca", "second_guard_ca", "candidate_key", "auth")
    seconds = ("second_guard_cert", "second_guard_key")
    for name in (*files, *seconds, "model_key", "audit_key", "audit_payload_key"):
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            yield f"{name}: {path} is not a file"
    for folder in settings.policies:
        if not folder.exists():
            yield f"policies: {folder} does not exist"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and where each value came from."""

    settings: Settings
    sources: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """One YAML line per knob, with source and reason as its comment. Holds no secret."""
        for name, knob in FIELDS.items():
            value = _plain(getattr(self.settings, name))
            pair = yaml.safe_dump({name: value}, default_flow_style=True, width=10_000)
            source = self.sources.get(name, "default")
            yield f"{pair.strip()[1:-1]:<44} # {source}: {knob.metadata['why']}"


def load(
    flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None = None
) -> Loaded:
    """Settings from flags, then environment, then file, then defaults.

    Raises ConfigError with every mistake at once; unknown names are mistakes.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in (
        (f"file {file}", _file_layer(file, problems)),
        ("environment", _environment_layer(environment)),
        ("flag", dict(flags)),
    ):
        for name, raw in layer.items():
            shown = ENVIRONMENT_PREFIX + name.upper() if source == "environment" else name
            if name not in FIELDS:
                prefix = ENVIRONMENT_PREFIX if source == "environment" else ""
                problems.append(f"{source}: unknown setting {shown}{_hint(name, prefix)}")
                continue
            try:
                values[name] = _converted(TYPES[name], raw)
                sources[name] = shown if source == "environment" else source
            except ValueError as error:
                problems.append(f"{source}: {shown}: {error}")
    try:
        settings = Settings(**values)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(tuple(problems))
    return Loaded(settings, sources)


def _file_layer(file: Path | None, problems: list[str]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        problems.append(f"file {file}: {reason}")
        return {}
    except yaml.YAMLError as error:
        problems.append(f"file {file}: {' '.join(str(error).split())}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"file {file}: must be a mapping of settings")
        return {}
    return {str(key): value for key, value in content.items()}


def _environment_layer(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and not _is_kubernetes_link(name, value)
    }


def _is_kubernetes_link(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker made this variable for a service called guard-something."""
    made = ("_SERVICE_HOST", "_SERVICE_PORT", "_PORT_")
    return value.startswith("tcp://") or any(part in name for part in made)


def _hint(name: str, prefix: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1)
    if not near:
        return "; --help lists them all"
    return f"; did you mean {prefix}{near[0].upper() if prefix else near[0]}?"


def _converted(kind: Any, raw: Any) -> Any:
    """A raw value (text from flags and environment, anything from YAML) as the knob's type."""
    if kind is bool:
        return _converted_bool(raw)
    if kind in (int, float):
        return _converted_number(kind, raw)
    if kind is str:
        if isinstance(raw, str):
            return raw
    elif kind == tuple[Path, ...]:
        items = raw.split(":") if isinstance(raw, str) else raw
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(Path(item) for item in items if item)
        raise ValueError(f"{raw!r} is not a list of paths")
    elif raw is None or isinstance(raw, str):
        return Path(raw) if raw else None
    raise ValueError(f"{raw!r} is not text")


def _converted_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if str(raw).lower() in ("true", "1", "yes", "on"):
        return True
    if str(raw).lower() in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{raw!r} is neither true nor false")


def _converted_number(kind: type[int] | type[float], raw: Any) -> int | float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(f"{raw!r} is not a number")
    if isinstance(raw, str):
        raw = raw.replace("_", "")
    try:
        number = kind(raw)
    except (ValueError, OverflowError):
        raise ValueError(f"{raw!r} is not a{'n integer' if kind is int else ' number'}") from None
    if number != number or (isinstance(raw, float) and number != raw):
        raise ValueError(f"{raw!r} is not a{'n integer' if kind is int else ' number'}")
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value
