"""The manifest of an artifact, guard.json: what it says, and a reader that names every mistake."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from guard_policies.assessment import Direction

FORMAT = "guard-artifact/1"
TEMPLATES = ("compact", "compact-fixed", "llama-guard-3-1b", "llama-guard-3-8b")
SCHEMES = ("fp32", "int8", "int4")
CODE = re.compile(r"S[1-9][0-9]?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """guard.json is not a manifest this version can serve; `problems` holds every mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tokens a verdict is made of. `head` are those with a column in the logits, in order."""

    head: tuple[int, ...]
    safe: int
    unsafe: int
    newline: int
    mark: int  # "S", before a category's number
    codes: Mapping[str, int]  # the number's token, for each code a prompt may list


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the Llama; `max_positions` is the longest input it may be given, in tokens."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are stored; `block` is 0 for fp32."""

    scheme: str
    embedding: str
    block: int


@dataclass(frozen=True, slots=True)
class File:
    """A file of the artifact."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """P(unsafe) = sigmoid(scale * (logit(unsafe) - logit(safe)) + bias).

    Platt scaling (Platt, 1999); with bias 0 temperature scaling (Guo et al., 2017). Fitted on data
    the model was not trained on. The scale is positive, so ranking is untouched.
    """

    scale: float = 1.0
    bias: float = 0.0

    def probability(self, logit: float) -> float:
        """The calibrated P(unsafe) of an uncalibrated logit."""
        x = self.scale * logit + self.bias
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass(frozen=True, slots=True)
class Golden:
    """A conversation and what the artifact's own engine scored when it was made."""

    turns: tuple[tuple[str, str], ...]  # (role, text), roles "user" and "assistant"
    unsafe: float
    categories: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that guard.json says. Categories are those the model knows by its default wording."""

    name: str
    template: str
    window_tokens: int
    categories: tuple[str, ...]
    custom_categories: bool
    verdict: Verdict
    geometry: Geometry
    parameters: int
    quantization: Quantization
    licence: str
    notice: str = ""
    calibration: Mapping[Direction, Calibration] = field(
        default_factory=lambda: {way: Calibration() for way in Direction}
    )
    golden: tuple[Golden, ...] = ()
    tolerance: float = 0.05  # by which a golden prompt's scores may differ on another machine
    files: Mapping[str, File] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)  # any JSON: recipe, data, versions

    def document(self) -> dict[str, Any]:
        """The JSON object of guard.json."""
        document = {"format": FORMAT, **asdict(self)}
        document["calibration"] = {way.value: asdict(c) for way, c in self.calibration.items()}
        return document

    @property
    def digest(self) -> str:
        """ "sha256:..." of the canonical manifest, and so of every file it lists."""
        document = self.document()
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def parse_manifest(content: bytes) -> Manifest:
    """Read guard.json. Raises ManifestError with every mistake in it."""
    try:
        document = json_object(content)
    except ValueError as error:
        raise ManifestError([str(error)]) from error
    found = document.get("format")
    if found != FORMAT:
        raise ManifestError(
            [f"format is {_short(found)}, this version reads {FORMAT!r}; update it, or re-export"]
        )
    reader = Reader()
    manifest = _manifest(reader, document)
    if manifest is not None and not reader.problems:
        _consistent(manifest, reader.problems)
    if reader.problems or manifest is None:
        raise ManifestError(reader.problems)
    return manifest


def json_object(content: bytes) -> dict[str, Any]:
    """The object that a stranger's JSON is. Raises ValueError for all that is not exactly one."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return dict(pairs)

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a number")

    try:
        document = json.loads(content, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


class Reader:
    """Checks a stranger's values and collects what is wrong with them, each with its path.

    Each method but `fields` and `wrong` is a check, or makes one, of a value and its path.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def fields(self, value: Any, path: str, checks: Mapping[str, Callable[[Any, str], Any]]) -> Any:
        """The checked fields of an object; every missing and unknown one is a problem."""
        if not isinstance(value, dict):
            return self.wrong(path, value, "an object")
        dot = f"{path}." if path else ""
        self.problems += [f"{dot}{name}: missing" for name in checks if name not in value]
        self.problems += [f"{dot}{_short(name)}: unknown" for name in value if name not in checks]
        return {
            name: check(value[name], dot + name) for name, check in checks.items() if name in value
        }

    def wrong(self, path: str, value: Any, wanted: str) -> Any:
        self.problems.append(f"{path}: must be {wanted}, is {_short(value)}")

    def text(self, value: Any, path: str) -> Any:
        return value if isinstance(value, str) else self.wrong(path, value, "text")

    def flag(self, value: Any, path: str) -> Any:
        return value if isinstance(value, bool) else self.wrong(path, value, "true or false")

    def whole(self, least: int, most: int) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if type(value) is int and least <= value <= most:
                return value
            return self.wrong(path, value, f"a whole number from {least} to {most}")

        return check

    def real(self, least: float, most: float) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if type(value) in (int, float) and least <= value <= most:
                return float(value)
            return self.wrong(path, value, f"a number from {least} to {most}")

        return check

    def one_of(self, known: tuple[str, ...]) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if value in known and isinstance(value, str):
                return value
            return self.wrong(path, value, f"one of {', '.join(known)}")

        return check

    def matching(self, pattern: re.Pattern[str], wanted: str) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if isinstance(value, str) and pattern.fullmatch(value):
                return value
            return self.wrong(path, value, wanted)

        return check

    def many(self, item: Callable[[Any, str], Any], most: int) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if not isinstance(value, list) or len(value) > most:
                return self.wrong(path, value, f"a list of at most {most}")
            return tuple(item(entry, f"{path}[{at}]") for at, entry in enumerate(value))

        return check

    def pair(
        self, first: Callable[[Any, str], Any], second: Callable[[Any, str], Any]
    ) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if not isinstance(value, list) or len(value) != 2:
                return self.wrong(path, value, "a list of two")
            return first(value[0], f"{path}[0]"), second(value[1], f"{path}[1]")

        return check

    def mapping(
        self, key: Callable[[Any, str], Any], item: Callable[[Any, str], Any], most: int
    ) -> Callable[[Any, str], Any]:
        def check(value: Any, path: str) -> Any:
            if not isinstance(value, dict) or len(value) > most:
                return self.wrong(path, value, f"an object of at most {most}")
            return {
                key(name, f"{path}.{_short(name)}"): item(entry, f"{path}.{_short(name)}")
                for name, entry in value.items()
            }

        return check

    def made(
        self, kind: Callable[..., Any], **checks: Callable[[Any, str], Any]
    ) -> Callable[[Any, str], Any]:
        """An object with exactly these fields, made into `kind`; None when something is wrong."""

        def check(value: Any, path: str) -> Any:
            before = len(self.problems)
            fields = self.fields(value, path, checks)
            return kind(**fields) if len(self.problems) == before else None

        return check


def _manifest(r: Reader, document: dict[str, Any]) -> Manifest | None:
    token, size = r.whole(0, 2**24), r.whole(1, 2**20)
    code, text, score = r.matching(CODE, "a code such as S1"), r.text, r.real(0, 1)
    calibration = r.made(Calibration, scale=r.real(1e-3, 1e3), bias=r.real(-1e3, 1e3))
    way = r.one_of(tuple(way.value for way in Direction))
    turn = r.pair(r.one_of(("user", "assistant")), text)
    geometry = {name: size for name in Geometry.__slots__}
    made = r.made(
        _made,
        format=r.text,
        name=r.matching(_FILE, "a name of letters, digits, '.', '_' and '-'"),
        notice=text,
        licence=text,
        template=r.one_of(TEMPLATES),
        window_tokens=r.whole(16, 2**20),
        categories=r.many(code, 99),
        custom_categories=r.flag,
        verdict=r.made(
            Verdict,
            head=r.many(token, 2**12),
            safe=token,
            unsafe=token,
            newline=token,
            mark=token,
            codes=r.mapping(code, token, 99),
        ),
        geometry=r.made(Geometry, **{**geometry, "vocab": r.whole(1, 2**24)}),
        parameters=r.whole(1, 2**40),
        quantization=r.made(
            Quantization,
            scheme=r.one_of(SCHEMES),
            embedding=r.one_of(SCHEMES),
            block=r.whole(0, 512),
        ),
        calibration=r.mapping(way, calibration, 2),
        golden=r.many(
            r.made(
                Golden, turns=r.many(turn, 64), unsafe=score, categories=r.mapping(code, score, 99)
            ),
            1000,
        ),
        tolerance=r.real(0, 0.2),
        files=r.mapping(
            r.matching(_FILE, "a plain file name"),
            r.made(File, size=r.whole(0, 2**36), sha256=r.matching(_SHA256, "64 hex digits")),
            32,
        ),
        provenance=r.mapping(text, lambda value, path: value, 100),
    )
    manifest: Manifest | None = made(document, "")
    return manifest


def _made(format: str, calibration: Mapping[str, Calibration], **fields: Any) -> Manifest:
    by_way = {Direction(way): value for way, value in calibration.items()}
    return Manifest(calibration=by_way, **fields)


def _short(value: Any) -> str:
    """A value in an error message: never long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _consistent(manifest: Manifest, problems: list[str]) -> None:
    """What no single field shows."""
    verdict, geometry = manifest.verdict, manifest.geometry
    wanted = {"safe": verdict.safe, "unsafe": verdict.unsafe}
    wanted |= {f"codes.{code}": token for code, token in verdict.codes.items()}
    problems += [
        f"verdict.{name}: token {token} is not in verdict.head"
        for name, token in wanted.items()
        if token not in verdict.head
    ]
    if len(set(verdict.head)) != len(verdict.head):
        problems.append("verdict.head: a token stands twice")
    if len(set(wanted.values())) != len(wanted):
        problems.append("verdict: two of safe, unsafe and codes are the same token")
    tokens = (*verdict.head, verdict.newline, verdict.mark)
    if max(tokens, default=0) >= geometry.vocab:
        problems.append("verdict: a token is outside the vocabulary")
    if not manifest.categories or len(set(manifest.categories)) != len(manifest.categories):
        problems.append("categories: empty, or one stands twice")
    missing = [code for code in manifest.categories if code not in verdict.codes]
    problems += [f"verdict.codes: {code} is missing" for code in missing]
    if geometry.heads % geometry.kv_heads:
        problems.append("geometry: heads is not a multiple of kv_heads")
    if set(manifest.calibration) != set(Direction):
        problems.append("calibration: must have prompt and response")
