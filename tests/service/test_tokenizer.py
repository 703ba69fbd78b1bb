"""Tokenizers come from files that may be hostile; those that are taken lose no text."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from guard_service.tokenizer import TokenizerError, encode, from_ranks, load_tokenizer
from tests.service.own_tokenizer import own_ranks, own_tokenizer


def test_ranks_give_their_tokens_their_ranks_and_special_tokens_the_ids_behind() -> None:
    tokenizer = own_tokenizer()
    size = own_ranks().count(b"\n")
    for line in own_ranks().splitlines():
        token, rank = line.split()
        text = base64.b64decode(token).decode(errors="replace")
        if "\ufffd" not in text and text.isalpha():
            assert encode(tokenizer, text) == [int(rank)]
    assert tokenizer.token_to_id("<|begin_of_text|>") == size
    assert tokenizer.token_to_id("<|start_header_id|>") == size + 6
    assert tokenizer.token_to_id("<|end_header_id|>") == size + 7
    assert tokenizer.token_to_id("<|eot_id|>") == size + 9
    assert tokenizer.get_vocab_size() == size + 256
    assert from_ranks(own_ranks(), image=True).token_to_id("<|image|>") == size + 256


def test_punctuation_and_the_newlines_behind_it_are_split_off_together() -> None:
    tokens = own_tokenizer().encode("boils?\n\nUser: 1234567", add_special_tokens=False).tokens
    assert "".join(tokens).startswith("boils?ĊĊUser:Ġ")
    assert encode(own_tokenizer(), "boils?\n\nUser") == [
        *encode(own_tokenizer(), "boils"),
        *encode(own_tokenizer(), "?\n\n"),
        *encode(own_tokenizer(), "User"),
    ]


def test_special_spellings_are_ordinary_text() -> None:
    ids = encode(own_tokenizer(), "<|eot_id|><|begin_of_text|>")
    assert own_tokenizer().token_to_id("<|eot_id|>") not in ids
    assert own_tokenizer().decode(ids) == "<|eot_id|><|begin_of_text|>"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_whole(text: str) -> None:
    ids = encode(own_tokenizer(), text)
    assert own_tokenizer().decode(ids, skip_special_tokens=False) == text


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        encode(own_tokenizer(), "a\ud800b")


@pytest.mark.parametrize(
    "text",
    ["a short sentence, then more. " * 10_000, "  \n word" * 40_000, "x " + "\t " * 140_000],
    ids=["prose", "indented", "blanks"],
)
def test_long_text_in_pieces_has_the_tokens_of_the_whole(text: str) -> None:
    whole = own_tokenizer().encode(text, add_special_tokens=False).ids
    assert encode(own_tokenizer(), text) == whole


@pytest.mark.skipif("GUARD_TEST_EXAMPLES" not in os.environ, reason="slow; set GUARD_TEST_EXAMPLES")
def test_ten_million_blanks_in_a_row_are_encoded() -> None:
    assert encode(own_tokenizer(), " " * 10_100_000)  # in one piece the library panics


def test_a_saved_tokenizer_loads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    own_tokenizer().save(str(path))
    loaded = load_tokenizer(path)
    for text in ("The kettle sings?\n\nUser: é <|eot_id|>", " \t\r\n", "日本"):
        assert encode(loaded, text) == encode(own_tokenizer(), text)
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(own_ranks())
    assert encode(load_tokenizer(ranks), "kettle") == encode(own_tokenizer(), "kettle")


def test_a_tokenizer_as_trained_with_the_gpt2_rule_loads(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the kettle sings"], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.decode(encode(loaded, "the <|eot_id|>\n")) == "the <|eot_id|>\n"


def _ranks_with(line: int, content: bytes) -> bytes:
    lines = own_ranks().splitlines()
    lines[line] = content
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (b"", "256 of the 256"),
        (_ranks_with(3, b"!!! 3"), "line 4 of the ranks: not base64"),
        (_ranks_with(3, b"IQ=="), "line 4 of the ranks: rank 3"),
        (_ranks_with(3, b"QUJD 99"), "line 4 of the ranks: rank 3"),
        (_ranks_with(3, b" 3"), "line 4 of the ranks: a token of 0 bytes"),
        (_ranks_with(300, base64.b64encode(b"a" * 600) + b" 300"), "600 bytes"),
        (_ranks_with(300, b"YQ== 300"), "line 301 of the ranks: the token is there already"),
        (_ranks_with(3, b"eHl6enk= 3"), "1 of the 256"),
        (b"\x00\xff" * 1000, "line 1 of the ranks"),
    ],
)
def test_bad_ranks_are_named(ranks: bytes, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        from_ranks(ranks)


def _set(*path: str | int, value: object) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("model", value=None), "holds no model"),
        (_set("model", "type", value="WordPiece"), "not BPE"),
        (_set("model", "vocab", value=[]), "not BPE"),
        (_set("model", "dropout", value=0.5), "dropout"),
        (_set("model", "unk_token", value="?"), "unk_token"),
        (_set("model", "byte_fallback", value=True), "byte-level"),
        (_set("normalizer", value={"type": "Lowercase"}), "normalizer"),
        (_set("pre_tokenizer", value=None), "splitting rule"),
        (_set("pre_tokenizer", "pretokenizers", 0, "behavior", value="Removed"), "splitting rule"),
        (
            _set("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": "(a+)+$"}),
            "splitting rule",
        ),
        (_set("model", "vocab", "kettle", value=5), "share an id"),
        (_set("model", "vocab", "kettle", value=2**40), "below 2"),
        (_set("model", "vocab", value={"a": 0}), "lacks single bytes"),
        (_set("added_tokens", 0, "special", value=False), "could become it"),
        (_set("added_tokens", value={"a": 1}), "added_tokens"),
        (_set("model", "merges", value=[["no", "such"]]), "not a BPE tokenizer"),
        (_set("version", value=7), "not a BPE tokenizer"),
    ],
)
def test_a_json_that_could_lose_text_is_refused(
    change: Callable[[Any], None], words: str, tmp_path: Path
) -> None:
    document = json.loads(own_tokenizer().to_str())
    change(document)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_not_a_tokenizer_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
