"""What WordNet's files say, and what is made of them for a student to learn on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from guard_policies.assessment import Direction
from guard_quantization.data import Row
from guard_quantization.unlabelled import unlabelled_rows
from guard_quantization.wordnet import WordNet, WordNetError, read_wordnet
from tests.quantization.small_wordnet import write_wordnet


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    return read_wordnet(write_wordnet(tmp_path / "wordnet"))


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


def test_sentences_lemmas_and_kin_are_read(wordnet: WordNet) -> None:
    assert wordnet.glosses[:2] == ["a place to live in", "a dwelling for one family"]
    assert wordnet.examples == ["they painted the house", "a house burned", "guests galore"]
    assert wordnet.nouns == ["boat", "dwelling", "garden shed", "house", "tent"]  # no proper names
    assert wordnet.verbs == ["bake", "cook up"]
    assert wordnet.kin["house"] == ["tent", "garden shed"]
    assert "boat" not in wordnet.kin


@pytest.mark.parametrize("content", [None, "no synset here\n", "1 2 n 0z x | y\n"])
def test_a_folder_without_the_database_is_refused_with_a_way_out(
    tmp_path: Path, content: str | None
) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    if content is None:
        (folder / "data.verb").unlink()
    else:
        (folder / "data.verb").write_text(content)
    with pytest.raises(WordNetError, match=r"data\.verb: .*wordnet-base"):
        read_wordnet(folder)


def test_a_third_of_each_way_and_no_labels(wordnet: WordNet) -> None:
    made = unlabelled_rows(rows(), wordnet, 21, seed=0)
    assert Counter(row.source for row in made) == {"wordnet": 7, "frame": 7, "exchange": 7}
    assert not any(row.labelled for row in made)
    assert len({row.id for row in made}) == 21
    assert made == unlabelled_rows(rows(), wordnet, 21, seed=0)
    assert made != unlabelled_rows(rows(), wordnet, 21, seed=1)


def test_exchanged_nouns_leave_the_rest_of_a_conversation(wordnet: WordNet) -> None:
    made = [row for row in unlabelled_rows(rows(), wordnet, 240, 0) if row.source == "exchange"]
    replies = [row for row in made if row.direction is Direction.RESPONSE]
    assert replies and all(row.turns[0] == ("user", "please bake") for row in replies)
    texts = {row.turns[-1][1] for row in made}
    assert "they burn the tent" in texts  # kin
    assert "they burn the boat" in texts  # a word of the training sentences
    assert not any("das" in text for text in texts)


def test_frames_are_filled_whole(wordnet: WordNet) -> None:
    made = [row for row in unlabelled_rows(rows(), wordnet, 600, 0) if row.source == "frame"]
    texts = " ".join(row.turns[-1][1] for row in made)
    assert "{" not in texts and "garden shed" in texts and "cook up" in texts
