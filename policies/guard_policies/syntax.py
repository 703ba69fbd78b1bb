"""The policy language: from a file's nodes to what its author said, not yet resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from yaml.nodes import MappingNode, Node, ScalarNode

from guard_policies.assessment import Action, Direction
from guard_policies.image_uris import read_image_uris
from guard_policies.positions import Entry, Reader, quote, suggest
from guard_policies.schema import (
    ANY_ENGINE,
    MIN_THRESHOLD,
    Band,
    Candidate,
    Cascade,
    ImageUris,
    Mode,
    Stream,
    Unscannable,
    WhenUnable,
    normal_tag,
)
from guard_policies.taxonomy import BY_CODE, Category

OFF = "off"
ACTIONS = (OFF, *(action.value for action in Action))
RULE_KEYS = ("action", "threshold")
SETTING_KEYS = (*RULE_KEYS, "on_unavailable", "on_unscannable")
DIRECTION_KEYS = tuple(direction.value for direction in Direction)
CATEGORY_KEYS = ("name", "description", *SETTING_KEYS, *DIRECTION_KEYS)
LANGUAGE_CATEGORY_KEYS = (*RULE_KEYS, *DIRECTION_KEYS)
LANGUAGE_KEYS = (*LANGUAGE_CATEGORY_KEYS, "categories")
STREAM_CHARS = {
    "check_every_chars": (1, 100_000),
    "first_check_chars": (1, 100_000),
    "hold_back_chars": (0, 100_000),
}
STREAM_KEYS = (*STREAM_CHARS, "sentence_ends")
CASCADE_KEYS = ("second", "band", "categories", "images", "when_unable", "timeout_s")
CANDIDATE_KEYS = ("for", "share")
CASCADE_TIMEOUT_S = (0.01, 300.0)
ABOUT_KEYS = ("name", "version", "description", "mode", "engine")
POLICY_KEYS = (
    *ABOUT_KEYS,
    *SETTING_KEYS,
    *DIRECTION_KEYS,
    "categories",
    "languages",
    "stream",
    "cascade",
    "image_uris",
    "candidate",
    "refusal",
)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ENGINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CODE = re.compile(r"S[1-9][0-9]?")
TAG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{1,8})*")
_DELIMITER = re.compile(r"<\s*(begin|end)\b|<\|", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Settings:
    """What one place of the file says; None where it is silent. `action` may be OFF."""

    action: str | None = None
    threshold: float | None = None
    on_unavailable: Action | None = None
    on_unscannable: Unscannable | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """Settings for both directions, and those that hold for one only."""

    both: Settings = Settings()
    by_direction: Mapping[Direction, Settings] = field(default_factory=dict)

    def chain(self, direction: Direction) -> tuple[Settings, Settings]:
        """The settings that hold in a direction, the more particular ones first."""
        return self.by_direction.get(direction, Settings()), self.both


@dataclass(frozen=True, slots=True)
class LanguageDraft:
    """What a policy says about one language, and where it says so."""

    whole: Scope
    categories: Mapping[str, Scope]
    keys: Mapping[str, ScalarNode]


@dataclass(frozen=True, slots=True)
class CascadeDraft:
    """What a policy says about its cascade, and where it names categories."""

    cascade: Cascade
    keys: Mapping[str, ScalarNode]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a policy file says. Only complete if the reader has no problems."""

    name: str
    name_node: Node
    version: str
    description: str
    mode: Mode
    engine: str
    base: Scope
    wording: tuple[Category, ...]  # all known categories, then own ones in the file's order
    categories: Mapping[str, Scope]
    languages: Mapping[str, LanguageDraft]
    stream: Stream
    cascade: CascadeDraft | None
    image_uris: ImageUris
    candidate: Candidate | None
    refusals: Mapping[str, str]


def read_draft(reader: Reader, root: MappingNode) -> Draft:
    """Read a whole policy; mistakes go to the reader."""
    entries = reader.table(root, "a policy", POLICY_KEYS)
    for key in ("name", "version"):
        if key not in entries:
            reader.report(root, f"{key!r} is missing")
    wording, categories = _categories(reader, entries.get("categories"))
    codes = tuple(category.code for category in wording)
    return Draft(
        name=_name(reader, entries.get("name"), "name") or "",
        name_node=entries["name"].value if "name" in entries else root,
        version=_text(reader, entries, "version", 64) or "",
        description=_text(reader, entries, "description", 1000) or "",
        mode=_mode(reader, entries.get("mode")),
        engine=_name(reader, entries.get("engine"), "engine", ENGINE) or ANY_ENGINE,
        base=_scope(reader, entries, SETTING_KEYS),
        wording=wording,
        categories=categories,
        languages=_languages(reader, entries.get("languages"), codes),
        stream=_stream(reader, entries.get("stream")),
        cascade=_cascade(reader, entries.get("cascade"), codes),
        image_uris=read_image_uris(reader, entries.get("image_uris")),
        candidate=_candidate(reader, entries.get("candidate"), entries.get("name")),
        refusals=_refusals(reader, entries.get("refusal")),
    )


def _candidate(reader: Reader, entry: Entry | None, own: Entry | None) -> Candidate | None:
    if entry is None:
        return None
    entries = reader.table(entry.value, "candidate", CANDIDATE_KEYS)
    of = _name(reader, entries.get("for"), "for")
    if "for" not in entries:
        reader.report(entry.key, "a candidate needs `for`, the policy whose place it may take")
    elif own is not None and isinstance(own.value, ScalarNode) and of == own.value.value:
        reader.report(entries["for"].value, "a policy is no candidate for its own place")
    found = entries.get("share")
    share = found and reader.number(found.value, "share", 0.0, 100.0)
    return Candidate(of, share or 0.0) if of else None


def _text(reader: Reader, entries: Mapping[str, Entry], key: str, longest: int) -> str | None:
    entry = entries.get(key)
    return None if entry is None else reader.text(entry.value, key, longest)


def _name(
    reader: Reader, entry: Entry | None, what: str, pattern: re.Pattern[str] = NAME
) -> str | None:
    value = None if entry is None else reader.text(entry.value, what, 64)
    if entry is not None and value is not None and not pattern.fullmatch(value):
        letters = "a-z" if pattern is NAME else "letters"
        reader.report(
            entry.value,
            f"{what} {quote(value)} must be made of {letters}, 0-9, '.', '_' and '-', "
            "and begin with a letter or digit",
        )
        return None
    return value


def _mode(reader: Reader, entry: Entry | None) -> Mode:
    word = entry and reader.word(entry.value, "mode", [mode.value for mode in Mode])
    return Mode(word) if word else Mode.ENFORCE


def _stream(reader: Reader, entry: Entry | None) -> Stream:
    if entry is None:
        return Stream()
    entries, usual = reader.table(entry.value, "stream", STREAM_KEYS), Stream()

    def chars(key: str, otherwise: int) -> int:
        found = key in entries and reader.integer(entries[key].value, key, *STREAM_CHARS[key])
        return otherwise if found is None or found is False else found

    ends = entries.get("sentence_ends")
    return Stream(
        chars("check_every_chars", usual.check_every_chars),
        chars("first_check_chars", usual.first_check_chars),
        bool(ends and reader.flag(ends.value, "sentence_ends")),
        chars("hold_back_chars", usual.hold_back_chars),
    )


def _cascade(reader: Reader, entry: Entry | None, codes: tuple[str, ...]) -> CascadeDraft | None:
    if entry is None:
        return None
    entries = reader.table(entry.value, "cascade", CASCADE_KEYS)
    usual, found = Cascade(), {}
    scores: dict[str, float] = {}
    if (inner := entries.get("categories")) is not None:
        found = reader.table(inner.value, "categories of the cascade", codes)
        for code, one in found.items():
            score = reader.number(one.value, f"the score of {code}", 0.0, 1.0)
            scores[code] = 0.0 if score is None else score
    flag = reader.flag(entries["images"].value, "images") if "images" in entries else None
    images = usual.images if flag is None else flag
    bands = _bands(reader, entries.get("band"))
    if not ("band" in entries or found or images):
        reader.report(entry.key, "the cascade never asks the second guard; give it a band")
    unable = entries.get("when_unable")
    word = unable and reader.word(unable.value, "when_unable", [one.value for one in WhenUnable])
    limit = entries.get("timeout_s")
    timeout_s = limit and reader.number(limit.value, "timeout_s", *CASCADE_TIMEOUT_S)
    cascade = Cascade(
        second=_name(reader, entries.get("second"), "second", ENGINE) or ANY_ENGINE,
        bands=bands,
        categories=scores,
        images=images,
        when_unable=WhenUnable(word) if word else usual.when_unable,
        timeout_s=timeout_s or usual.timeout_s,
    )
    return CascadeDraft(cascade, {code: one.key for code, one in found.items()})


def _bands(reader: Reader, entry: Entry | None) -> dict[Direction, Band]:
    """One for both directions, or one under `prompt` and one under `response`."""
    if entry is None:
        return {}
    if not isinstance(entry.value, MappingNode):
        return {} if (band := _band(reader, entry)) is None else dict.fromkeys(Direction, band)
    found = reader.table(entry.value, "band", tuple(one.value for one in Direction))
    if not entry.value.value:
        reader.report(entry.value, "band must be two scores, or have some for prompt or response")
    read = {Direction(name): _band(reader, one) for name, one in found.items()}
    return {direction: band for direction, band in read.items() if band is not None}


def _band(reader: Reader, entry: Entry) -> Band | None:
    before = len(reader.problems)
    ends = [reader.number(one, "band", 0.0, 1.0) for one in reader.items(entry.value, "band")]
    match ends:
        case [float(low), float(high)] if low <= high:
            return low, high
    if len(reader.problems) == before:
        reader.report(entry.value, "band must be two scores like [0.2, 0.8], the lower one first")
    return None


def _refusals(reader: Reader, entry: Entry | None) -> dict[str, str]:
    """By lower-case tag; "" for the key `default` or for a text without languages."""
    if entry is None:
        return {}
    if isinstance(entry.value, ScalarNode):
        text = reader.text(entry.value, "refusal", 2000)
        return {} if text is None else {"": text}
    refusals: dict[str, str] = {}
    for key, one in reader.table(entry.value, "refusal", None).items():
        tag = "" if key == "default" else _tag(reader, one.key, refusals)
        text = reader.text(one.value, f"refusal in {quote(key)}", 2000)
        if tag is not None and text is not None:
            refusals[tag] = text
    return refusals


def _tag(reader: Reader, key: ScalarNode, taken: Mapping[str, object]) -> str | None:
    tag = normal_tag(key.value)
    if not TAG.fullmatch(tag) or len(tag) > 35:
        reader.report(key, f"{quote(key.value)} is no language tag such as 'de' or 'pt-BR'")
        return None
    if tag in taken:
        reader.report(key, f"the language {tag!r} is given twice")
        return None
    return tag


def _scope(reader: Reader, entries: Mapping[str, Entry], keys: tuple[str, ...]) -> Scope:
    """The settings among a mapping's entries, and those under `prompt:` and `response:`."""
    by_direction = {}
    for direction in Direction:
        if (entry := entries.get(direction.value)) is not None:
            inner = _word_or_table(reader, entry.value, direction.value, keys)
            by_direction[direction] = _settings(reader, inner, keys)
    return Scope(_settings(reader, entries, keys), by_direction)


def _word_or_table(
    reader: Reader, node: Node, what: str, keys: tuple[str, ...]
) -> dict[str, Entry]:
    """A mapping's entries; a single word stands for `action: word`."""
    if isinstance(node, ScalarNode) and node.value:
        return {"action": Entry(node, node)}
    return reader.table(node, what, keys)


def _settings(reader: Reader, entries: Mapping[str, Entry], keys: tuple[str, ...]) -> Settings:
    def word(key: str, words: tuple[str, ...]) -> str | None:
        entry = entries.get(key)
        return None if entry is None else reader.word(entry.value, key, words)

    languages = keys == RULE_KEYS
    action = word("action", ACTIONS)
    if action == OFF and languages:
        reader.report(
            entries["action"].value,
            "a language cannot turn a category off: models are asked before any language is "
            "looked at; did you mean 'allow'?",
        )
        action = None
    threshold = None
    if (entry := entries.get("threshold")) is not None:
        threshold = reader.number(entry.value, "threshold", MIN_THRESHOLD, 1.0)
    unavailable = unscannable = None
    if not languages:
        unavailable = word("on_unavailable", ACTIONS[1:])
        unscannable = word("on_unscannable", tuple(one.value for one in Unscannable))
    return Settings(
        action,
        threshold,
        Action(unavailable) if unavailable else None,
        Unscannable(unscannable) if unscannable else None,
    )


def _categories(
    reader: Reader, entry: Entry | None
) -> tuple[tuple[Category, ...], dict[str, Scope]]:
    wording, scopes = dict(BY_CODE), {}
    if entry is not None:
        for code, one in reader.table(entry.value, "categories", None).items():
            if not CODE.fullmatch(code):
                reader.report(one.key, f"{quote(code)} is no category code: S1 to S99")
                continue
            inner = _word_or_table(reader, one.value, code, CATEGORY_KEYS)
            scopes[code] = _scope(reader, inner, SETTING_KEYS)
            category = _wording(reader, code, one.key, inner)
            if category is not None:
                wording[code] = category
    return tuple(wording.values()), scopes


def _wording(
    reader: Reader, code: str, key: ScalarNode, entries: Mapping[str, Entry]
) -> Category | None:
    """The category in the file's words; None if it has none of its own."""
    known = BY_CODE.get(code)
    parts: dict[str, str | None] = {}
    for part, longest in (("name", 100), ("description", 2000)):
        parts[part] = _text(reader, entries, part, longest)
        if part not in entries and known is None:
            reader.report(key, f"{code} is a category of your own; it needs a {part!r}")
        elif _DELIMITER.search(parts[part] or ""):
            reader.report(entries[part].value, f"{part} of {code} holds a delimiter of the prompt")
    name, description = parts["name"], parts["description"]
    if name is not None and "\n" in name:
        reader.report(entries["name"].value, f"name of {code} must be one line")
    if known is not None and name is None and description is None:
        return None
    name = name or (known.prompt_name if known else code)
    return Category(code, name.rstrip("."), description or "")


def _languages(
    reader: Reader, entry: Entry | None, codes: tuple[str, ...]
) -> dict[str, LanguageDraft]:
    languages: dict[str, LanguageDraft] = {}
    if entry is None:
        return languages
    for key, one in reader.table(entry.value, "languages", None).items():
        tag = _tag(reader, one.key, languages)
        entries = reader.table(one.value, f"language {quote(key)}", LANGUAGE_KEYS)
        scopes, keys = {}, {}
        if (inner := entries.get("categories")) is not None:
            for code, own in reader.table(inner.value, "categories", None).items():
                if code not in codes:
                    hint = suggest(code, codes)
                    reader.report(own.key, f"{quote(code)} is no category of this policy{hint}")
                    continue
                what = _word_or_table(reader, own.value, code, LANGUAGE_CATEGORY_KEYS)
                scopes[code], keys[code] = _scope(reader, what, RULE_KEYS), own.key
        whole = _scope(reader, entries, RULE_KEYS)
        if tag is not None:
            languages[tag] = LanguageDraft(whole, scopes, keys)
    return languages
