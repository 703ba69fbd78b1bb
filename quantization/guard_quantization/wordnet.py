"""Princeton WordNet (Fellbaum, 1998), read from its database files: sentences and related words.

The files (`data.noun`, `data.verb`, ...; format: the manual page wndb(5WN)) come with the Debian
package wordnet-base, which puts them in /usr/share/wordnet, and with every other distribution of
WordNet 3.x.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
_EXAMPLE = re.compile(r'"([^"]+)"')
_MARK = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective stands: "galore(ip)"


class WordNetError(ValueError):
    """The folder holds no WordNet database; the text says where one comes from."""


@dataclass(frozen=True, slots=True)
class WordNet:
    """What the pipeline uses of WordNet."""

    glosses: list[str]  # definitions, one for each synset
    examples: list[str]  # sentences and phrases that show a synset's use
    nouns: list[str]  # lemmas, single words and compounds, lower case
    verbs: list[str]
    kin: dict[str, list[str]]  # noun -> nouns that share a parent in the hierarchy


def read_wordnet(folder: Path) -> WordNet:
    """Read the database files of a folder. Raises WordNetError when one is missing or unlike it."""
    glosses: list[str] = []
    examples: list[str] = []
    lemmas: dict[str, set[str]] = {part: set() for part in PARTS}
    children: dict[str, list[str]] = defaultdict(list)
    for part in PARTS:
        path = folder / f"data.{part}"
        try:
            lines = path.read_text("utf-8").splitlines()
            for line in lines:
                if line.startswith(" "):  # the licence at the top
                    continue
                words, parents, gloss = _synset(line)
                definition = gloss.split('; "')[0].strip()
                glosses.append(definition)
                examples += _EXAMPLE.findall(gloss)
                lemmas[part].update(words)
                if part == "noun":
                    for parent in parents:
                        children[parent] += words
        except (OSError, ValueError, IndexError) as error:
            raise WordNetError(
                f"{path}: not a WordNet database file ({error}); the Debian package wordnet-base "
                "has them in /usr/share/wordnet"
            ) from error
    return WordNet(
        glosses, examples, sorted(lemmas["noun"]), sorted(lemmas["verb"]), _kin(children)
    )


def _synset(line: str) -> tuple[list[str], list[str], str]:
    """Lower-case lemmas that begin with a lower-case letter, parents' offsets, and the gloss."""
    head, gloss = line.split(" | ", 1)
    fields = head.split()
    count = int(fields[3], 16)
    named = fields[4 : 4 + 2 * count : 2]
    at = 4 + 2 * count
    pointers = fields[at + 1 : at + 1 + 4 * int(fields[at])]
    parents = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] == "@"]
    words = [_MARK.sub("", word).replace("_", " ") for word in named if word[:1].islower()]
    return words, parents, gloss


def _kin(children: dict[str, list[str]]) -> dict[str, list[str]]:
    kin: dict[str, list[str]] = defaultdict(list)
    for words in children.values():
        for word in words:
            kin[word] += [other for other in words if other != word][:60]
    return dict(kin)
