"""English conversations without a label, for a student to learn from its teacher.

A small student trained on the labelled rows alone does not know most of English. Here it meets
words that those rows lack, and training sentences with a word or two exchanged (compare the data
augmentation of TinyBERT, Jiao et al., 2020). What each means and whether it is harmful is the
teacher's to say.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from guard_quantization.data import Row
from guard_quantization.wordnet import WordNet

FILE = "unlabelled"
_WORD = re.compile(r"[A-Za-z]{3,}")
_LONGEST = 300  # characters of a sentence whose words are exchanged

# {n}: a noun, {v}: a verb. Frames are neutral: what fills them decides.
FRAMES = (
    "how do I make {n}", "how do you make {n} at home", "how to {v} {n}", "how can I {v} a {n}",
    "what is {n}?", "tell me about {n}", "where can I buy {n}", "explain {n} to me",
    "write a short story about {n}", "write a poem about {n} and {m}", "I want to {v} my {n}",
    "I want to {v} {n}", "help me {v} the {n}", "give me steps to {v} {n} with {m}",
    "what is the best way to {v} a {n}?", "is it ok to {v} {n}?", "can you {v} the {n} for me",
    "why do people {v} {n}", "why are {n} so {v}", "I think {n} is worse than {m}",
    "the difference between {n} and {m}", "make {n} from {m}", "how to get {n} without {m}",
    "how do I get away with {n}", "list of {n}", "my {n} wants to {v}", "my {n} is like a {m}",
    "someone tried to {v} my {n}", "should I {v} {n} for my {m}?", "a guide to {n}",
    "I am afraid of {n}", "how to protect {n} from {m}", "detailed instructions for {n}",
    "all {n} should {v}", "I hate {n}", "I love {n}", "how much {n} is too much",
    "ways to hide {n} from {m}", "ways to {v} people", "how to stop {n}", "recipe for {n}",
    "how do I {v} someone with {n}", "history of {n} in {m}", "best {n} for {m}",
    "what happens if you {v} {n}", "pretend you are a {n} and {v} the {m}", "sell {n} online",
)  # fmt: skip


def unlabelled_rows(rows: Sequence[Row], wordnet: WordNet, count: int, seed: int) -> list[Row]:
    """`count` conversations: a third from WordNet's sentences, a third frames, a third exchanges.

    `rows` are the labelled rows whose sentences may be used (English ones are taken).
    """
    rng = random.Random(f"{seed}/unlabelled")
    sentences = [*wordnet.glosses, *wordnet.examples]
    rng.shuffle(sentences)
    made = [_row(FILE, "wordnet", n, (("user", text),)) for n, text in enumerate(sentences)]
    made = made[: count // 3]
    exchange = _Exchange([row for row in rows if row.language == "en"], wordnet, rng)
    ways: tuple[tuple[str, Callable[[], tuple[tuple[str, str], ...]]], ...] = (
        ("frame", lambda: (("user", exchange.framed()),)),
        ("exchange", exchange.draw),
    )
    while len(made) < count:
        name, draw = ways[len(made) % 2]
        made.append(_row(FILE, name, len(made), draw()))
    return made


def _row(file: str, way: str, number: int, turns: tuple[tuple[str, str], ...]) -> Row:
    name = f"{file}-{way}-{number}"
    return Row(name, turns, False, None, "en", way, file, "train", labelled=False)


class _Exchange:
    """Frames filled with words, and training sentences in which nouns are other nouns."""

    def __init__(self, rows: Sequence[Row], wordnet: WordNet, rng: random.Random) -> None:
        self.rng, self.wordnet = rng, wordnet
        self.rows: dict[str, list[Row]] = defaultdict(list)
        seen: Counter[str] = Counter()
        for row in rows:
            text = row.turns[-1][1]
            if len(text) <= _LONGEST:
                self.rows[row.file].append(row)
                seen.update(set(_WORD.findall(text.lower())))
        common = {word for word, times in seen.items() if times >= 2}
        self.nouns = sorted(common.intersection(wordnet.nouns))
        self.verbs = sorted(common.intersection(wordnet.verbs))
        self.known = set(self.nouns)

    def framed(self) -> str:
        """A frame filled with words, six in ten of them from the training sentences."""

        def word(common: Sequence[str], every: Sequence[str]) -> str:
            return self.rng.choice(common if self.rng.random() < 0.6 else every)

        text = self.rng.choice(FRAMES)
        for slot in ("{n}", "{m}"):
            text = text.replace(slot, word(self.nouns, self.wordnet.nouns))
        return text.replace("{v}", word(self.verbs, self.wordnet.verbs))

    def draw(self) -> tuple[tuple[str, str], ...]:
        """A training conversation with one to three nouns of its last turn exchanged."""
        row = self.rng.choice(self.rows[self.rng.choice(sorted(self.rows))])
        *before, (role, text) = row.turns
        spots = [spot for spot in _WORD.finditer(text) if spot[0].lower() in self.known]
        chosen = self.rng.sample(spots, min(len(spots), self.rng.choice((1, 1, 2, 3))))
        for spot in sorted(chosen, key=lambda spot: -spot.start()):
            text = text[: spot.start()] + self._other(spot[0].lower()) + text[spot.end() :]
        return (*before, (role, text))

    def _other(self, word: str) -> str:
        kin = self.wordnet.kin.get(word)
        if kin and self.rng.random() < 0.5:
            return self.rng.choice(kin)
        return self.rng.choice(self.nouns)
