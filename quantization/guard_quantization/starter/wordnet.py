"""Princeton WordNet (Fellbaum, 1998), read from its database file of nouns.

The file (`data.noun`; format: the manual page wndb(5WN)) comes with the Debian package
wordnet-base, which puts it in /usr/share/wordnet, and with every other distribution of WordNet 3.x.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


class WordNetError(ValueError):
    """The folder holds no WordNet database; the text says where one comes from."""


@dataclass(frozen=True, slots=True)
class Nouns:
    """Lower-case nouns, single words and compounds; and for each those that share a parent."""

    lemmas: frozenset[str]
    kin: dict[str, list[str]]


def read_nouns(folder: Path) -> Nouns:
    """Read data.noun of a folder. Raises WordNetError when it is missing or unlike one."""
    path = folder / "data.noun"
    lemmas: set[str] = set()
    children: dict[str, list[str]] = defaultdict(list)
    try:
        for line in path.read_text("utf-8").splitlines():
            if line.startswith(" "):  # the licence at the top
                continue
            words, parents = _synset(line)
            lemmas.update(words)
            for parent in parents:
                children[parent] += words
    except (OSError, ValueError, IndexError) as error:
        raise WordNetError(
            f"{path}: not WordNet's database of nouns ({error}); the Debian package wordnet-base "
            "has it in /usr/share/wordnet"
        ) from error
    kin: dict[str, list[str]] = defaultdict(list)
    for words in children.values():
        for word in words:
            kin[word] += [other for other in words if other != word][:60]
    return Nouns(frozenset(lemmas), {word: near for word, near in kin.items() if near})


def _synset(line: str) -> tuple[list[str], list[str]]:
    """Lemmas that begin with a lower-case letter, and the offsets of the parents."""
    fields = line.split(" | ")[0].split()
    count = int(fields[3], 16)
    at = 4 + 2 * count
    pointers = fields[at + 1 : at + 1 + 4 * int(fields[at])]
    parents = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] == "@"]
    words = [word.replace("_", " ") for word in fields[4:at:2] if word[:1].islower()]
    return words, parents
