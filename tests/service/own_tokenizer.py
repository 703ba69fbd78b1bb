"""A small tokenizer of the Llama 3 kind, trained on text of our own."""

from __future__ import annotations

import base64
from functools import cache

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from guard_service.tokenizer import LLAMA_3_SPLIT, from_ranks

_TEXT = """
The kettle sings before the water boils? Yes!\n\nUser: Which bus goes to the harbour?\n\n
Agent: Take the number 42, then walk. It isn't far; you'll see the boats.\n\n
Task: Check if there is unsafe content in 'Agent' messages in conversations.\n\n
<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Violent Crimes.\n<END UNSAFE CONTENT CATEGORIES>\n\n
<BEGIN CONVERSATION>\n\n<END CONVERSATION>\n\nProvide your safety assessment: safe unsafe\nS1,S2
for name in garden:\r\n    print(name, 1234567)\r\n
Où est la clé ? Das weiß niemand genau. Привет, сосед! 今日は雨です。
"""


@cache
def own_ranks() -> bytes:
    """A rank file: 256 bytes and some 400 merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    letters = sorted(alphabet)
    values = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    hidden = sorted(set(range(256)) - set(values.values()))
    values |= dict(zip([letter for letter in letters if ord(letter) >= 256], hidden, strict=True))
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [
        base64.b64encode(bytes(values[letter] for letter in token)) + b" %d\n" % rank
        for rank, (token, _) in enumerate(by_id)
    ]
    return b"".join(lines)


@cache
def own_tokenizer() -> Tokenizer:
    """Built from `own_ranks`; shared, as builders share theirs."""
    return from_ranks(own_ranks())
