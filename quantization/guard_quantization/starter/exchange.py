"""Training sentences with other words in them: no label, but a teacher to say what they mean.

Exchanged words bring a small student the words that its labelled rows lack, and the same sentence
with and without what made it harmful (compare TinyBERT, Jiao et al., 2020).
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from guard_quantization.data import Row
from guard_quantization.starter.wordnet import Nouns

FILE = "exchanged"
_WORD = re.compile(r"[A-Za-z]{3,}")
_LONGEST = 300  # characters of a sentence whose words are exchanged


def exchanged_rows(rows: Sequence[Row], nouns: Nouns, count: int, seed: int) -> list[Row]:
    """`count` English conversations of `rows`, one to three nouns of the judged turn exchanged.

    A noun is replaced by one that is near in WordNet, or by any noun of the rows. Every file has
    the same share.
    """
    rng = random.Random(f"{seed}/{FILE}")
    by_file: dict[str, list[Row]] = defaultdict(list)
    seen: set[str] = set()
    for row in rows:
        if row.language == "en" and len(row.turns[-1][1]) <= _LONGEST:
            by_file[row.file].append(row)
            seen.update(_WORD.findall(row.turns[-1][1].lower()))
    files, others = sorted(by_file), sorted(nouns.lemmas & seen)
    if not others:
        raise ValueError("nothing to exchange: no short English rows with a noun")
    made = []
    for number in range(count):
        row = rng.choice(by_file[rng.choice(files)])
        *before, (role, text) = row.turns
        turns = (*before, (role, _exchanged(text, nouns, others, rng)))
        name = f"{FILE}-{number}"
        made.append(Row(name, turns, False, None, "en", FILE, FILE, "train", labelled=False))
    return made


def _exchanged(text: str, nouns: Nouns, others: Sequence[str], rng: random.Random) -> str:
    spots = [spot for spot in _WORD.finditer(text) if spot[0].lower() in nouns.lemmas]
    chosen = rng.sample(spots, min(len(spots), rng.choice((1, 1, 2, 3))))
    for spot in sorted(chosen, key=lambda spot: -spot.start()):
        near = nouns.kin.get(spot[0].lower())
        other = rng.choice(near if near and rng.random() < 0.5 else others)
        text = text[: spot.start()] + other + text[spot.end() :]
    return text
