"""What is read of WordNet, and training sentences whose nouns are exchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_policies.assessment import Direction
from guard_quantization.data import Row
from guard_quantization.starter.exchange import exchanged_rows
from guard_quantization.starter.wordnet import Nouns, WordNetError, read_nouns
from tests.quantization.small_wordnet import write_wordnet


@pytest.fixture
def nouns(tmp_path: Path) -> Nouns:
    return read_nouns(write_wordnet(tmp_path / "wordnet"))


def rows() -> list[Row]:
    texts = ["they burn the house", "please bake a boat", "burn my house with a boat"]
    made = [
        Row(f"r{n}", (("user", text),), n == 0, None, "en", "toy", "toy", "train")
        for n, text in enumerate(texts)
    ]
    turns = (("user", "please bake"), ("assistant", "bake the house"))
    made.append(Row("reply", turns, False, (), "en", "toy", "replies", "train"))
    made.append(Row("de", (("user", "das house boat"),), False, (), "de", "toy", "de", "train"))
    return made


def test_nouns_and_their_kin_are_read_without_proper_names(nouns: Nouns) -> None:
    assert nouns.lemmas == {"dwelling", "house", "tent", "garden shed", "boat"}
    assert nouns.kin["house"] == ["tent", "garden shed"]
    assert "boat" not in nouns.kin


@pytest.mark.parametrize("content", [None, "no synset here\n", "1 2 n 0z x | y\n"])
def test_a_folder_without_the_database_is_refused_with_a_way_out(
    tmp_path: Path, content: str | None
) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    if content is None:
        (folder / "data.noun").unlink()
    else:
        (folder / "data.noun").write_text(content)
    with pytest.raises(WordNetError, match=r"data\.noun: .*wordnet-base"):
        read_nouns(folder)


def test_rows_come_as_asked_without_a_label_and_the_same_for_a_seed(nouns: Nouns) -> None:
    made = exchanged_rows(rows(), nouns, 40, seed=0)
    assert len({row.id for row in made}) == 40
    assert not any(row.labelled for row in made)
    assert made == exchanged_rows(rows(), nouns, 40, seed=0)
    assert made != exchanged_rows(rows(), nouns, 40, seed=1)


def test_only_nouns_of_the_judged_turn_change(nouns: Nouns) -> None:
    made = exchanged_rows(rows(), nouns, 200, seed=0)
    replies = [row for row in made if row.direction is Direction.RESPONSE]
    assert replies and all(row.turns[0] == ("user", "please bake") for row in replies)
    texts = {row.turns[-1][1] for row in made}
    assert {"they burn the garden shed", "they burn the boat"} <= texts  # kin, any other
    assert all("burn the" in text or "my" in text or "bake" in text for text in texts)
    assert not any("das" in text for text in texts)


def test_nothing_to_exchange_is_said(nouns: Nouns) -> None:
    with pytest.raises(ValueError, match="no short English rows with a noun"):
        exchanged_rows(rows()[-1:], nouns, 1, seed=0)
