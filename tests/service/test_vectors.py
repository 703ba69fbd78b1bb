"""The published prompts and verdicts, token for token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.chat_templates import ChatTemplateError
from guard_service.conversation import Conversation, Image, Message, Part, Role, Text
from guard_service.delimiters import breaks
from guard_service.parse import parse_answer
from guard_service.prompt import PromptBuilder
from guard_service.templates import BY_NAME
from guard_service.tokenizer import from_ranks

_REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "reference"
_TEMPLATES = {
    "Llama-Guard-3-1B": "llama-guard-3-1b",
    "Llama-Guard-3-8B": "llama-guard-3-8b",
    "Llama-Guard-3-11B-Vision": "llama-guard-3-11b-vision",
}
pytestmark = pytest.mark.skipif(not _REFERENCE.exists(), reason="no reference data")


def _load(name: str, key: str) -> list[dict[str, Any]]:
    path = _REFERENCE / "vectors" / name
    return list(json.loads(path.read_text())[key]) if path.exists() else []


_VECTORS = _load("prompt_vectors.json", "vectors")
_ERRORS = _load("prompt_vectors.json", "errors")
_VERDICTS = _load("verdict_vectors.json", "verdicts")


@cache
def _tokenizer() -> Tokenizer:
    return from_ranks((_REFERENCE / "tokenizer" / "tokenizer.model").read_bytes())


@cache
def _builder(template: str) -> PromptBuilder:
    return PromptBuilder(_tokenizer(), template, 4096)


def _exact(vector: dict[str, Any]) -> tuple[int, ...]:
    template, categories = _TEMPLATES[vector["model"]], vector.get("categories")
    if vector["producer"].startswith("llama-stack"):
        categories = categories or BY_NAME[template].wording
        template = "llama-stack"
    excluded = vector.get("excluded_category_keys", ())
    return _builder(template).chat_template(vector["messages"], categories, excluded)


@pytest.mark.parametrize("vector", _VECTORS, ids=lambda vector: vector["id"])
def test_chat_template_gives_the_published_tokens(vector: dict[str, Any]) -> None:
    assert list(_exact(vector)) == vector["token_ids"]


@pytest.mark.parametrize("vector", _ERRORS, ids=lambda vector: vector["id"])
def test_chat_template_raises_where_the_published_one_does(vector: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError):
        _exact(vector)


def test_serving_gives_the_published_tokens_and_two_newlines_for_plain_conversations() -> None:
    plain = [vector for vector in _VECTORS if _is_plain(vector)]
    for vector in plain:
        builder = _builder(_TEMPLATES[vector["model"]])
        excluded = vector.get("excluded_category_keys", ())
        categories = [
            category
            for category in LLAMA_GUARD_3
            if category.code in builder.template.wording and category.code not in excluded
        ]
        (prompt,) = builder.build(_conversation(vector), categories).prompts
        assert [*prompt.prefix, *prompt.body, *prompt.closing] == [*vector["token_ids"], 271]
    assert len(plain) >= 20


def _is_plain(vector: dict[str, Any]) -> bool:
    """Whether serving means to equal the published template, wording by categories aside."""
    if vector["producer"] != "hf-chat-template" or "hazard" in vector["id"]:
        return False
    parts = [part for message in _conversation(vector).messages for part in message.parts]
    defused = any(breaks(part.text) for part in parts if isinstance(part, Text))
    return not defused and "two-text-parts" not in vector["id"] and "categories" not in vector


def _conversation(vector: dict[str, Any]) -> Conversation:
    def parts(content: str | list[dict[str, str]]) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (Text(content),)
        return tuple(
            Text(part["text"]) if part["type"] == "text" else Image(b"image") for part in content
        )

    return Conversation(
        tuple(
            Message(Role(message["role"]), parts(message["content"]))
            for message in vector["messages"]
        )
    )


@pytest.mark.parametrize("verdict", _VERDICTS, ids=lambda verdict: repr(verdict["text"]))
def test_published_verdicts_parse(verdict: dict[str, Any]) -> None:
    answer = parse_answer(verdict["text"], BY_NAME["llama-guard-3-8b"].wording)
    assert ("unsafe" if answer.unsafe else "safe") == verdict["first_line"]
    assert all(code in verdict["text"] for code in answer.codes)
    ids = _tokenizer().encode(verdict["text"], add_special_tokens=False).ids
    assert [*ids, _tokenizer().token_to_id("<|eot_id|>")] == verdict["token_ids"]


def test_published_strings_have_the_published_tokens() -> None:
    known = json.loads((_REFERENCE / "tokenizer" / "verdict_tokens.json").read_text())["ids"]
    for text, ids in known.items():
        assert _tokenizer().encode(text, add_special_tokens=False).ids == ids


def test_special_tokens_have_the_published_ids() -> None:
    facts = json.loads((_REFERENCE / "tokenizer" / "special_tokens.json").read_text())
    for name, token in facts["named"].items():
        assert _tokenizer().token_to_id(name) == token
    assert _tokenizer().get_vocab_size() == facts["vocab_size"]
