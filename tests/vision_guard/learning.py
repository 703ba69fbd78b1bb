"""Trains a tiny Mllama, on one core, on the very prompts and tiles that the engine reads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.conversation import Conversation, Image, Message, Picture, Role, Text
from guard_service.engines.scoring import verdict_tokens
from guard_service.engines.torch.geometry import TEMPLATE, Geometry
from guard_service.engines.torch.pixels import Tiler, Tiles
from guard_service.manifest import Verdict
from guard_service.prompt import IMAGE_TOKEN_ID, PromptBuilder
from guard_service.templates import BY_NAME
from guard_service.tokenizer import LLAMA_3_SPLIT, from_ranks
from tests.quantization.verdict_tokenizer import verdict_ranks
from tests.service.torch import checkpoints
from tests.service.torch.checkpoints import TEXT, VISION
from tests.vision_guard import drawings
from tests.vision_guard.drawings import (
    KINDS,
    LOOKING,
    MAKING,
    REPLIES,
    WRITTEN,
    Row,
    rows,
)

NAME = "llama-guard-3-11b-vision"
CATEGORIES = LLAMA_GUARD_3[:13]  # what the published model lists
SEED = 11
_END = 5  # tokens: end of turn, the assistant's header, two newlines


def tokenizer() -> Tokenizer:
    """Every word of the template is one token, so that prompts are short; bytes for the rest."""
    template = BY_NAME[NAME]
    wording = [f"{code}: {text}\n" for code, text in template.wording.items()]
    said = [f"{word} {word}" for word in ("User:", "Agent:", WRITTEN, *LOOKING, *MAKING, *REPLIES)]
    pieces = [*template.prefix("User", template.wording), *template.closing("User")]
    everything = [*pieces, *wording, *said]
    text = "".join(piece for piece in everything if isinstance(piece, str))
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")
    known = verdict_ranks().splitlines()
    taken = {base64.b64decode(line.split()[0]) for line in known}
    words = dict.fromkeys(word.encode() for word, _ in split.pre_tokenize_str(text))
    new = [word for word in words if word not in taken]
    lines = [base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(new, len(known))]
    return from_ranks(b"\n".join([*known, *lines]), image=True)


TEXT_SIZES: dict[str, Any] = TEXT | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "cross_attention_layers": [1, 3],
    "initializer_range": 0.1,
}
VISION_SIZES: dict[str, Any] = VISION | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 2,
    "vision_output_dim": 128,
    "intermediate_layers_indices": [0],
    "patch_size": 7,
    "initializer_range": 0.1,
}


def untrained(words: Tokenizer) -> Any:
    """Every gate half open, so that images matter from the first step."""
    vocabulary = words.get_vocab_size() - 1  # the image's token has a row of the embedding only
    config = MllamaConfig(
        text_config=TEXT_SIZES | {"vocab_size": vocabulary},
        vision_config=VISION_SIZES,
        image_token_index=vocabulary,
    )
    model = MllamaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "gate" in name and weight.dim() == 1:
            weight.data.fill_(0.5)
    return model


@dataclass(frozen=True, slots=True)
class Learnt:
    """A row as the model is shown it, and what it should say."""

    ids: list[int]  # of the prompt and the verdict's own tokens
    tiles: Tiles | None
    image_at: int
    unsafe: bool
    code: int  # the token, where unsafe
    kind: int  # of the drawing, in KINDS


class Lessons:
    """Makes rows into what the model learns from, as the engine makes them into what it reads."""

    def __init__(self, words: Tokenizer) -> None:
        self.verdict = verdict_tokens(words, [f"S{number}" for number in range(1, 14)])
        self._builder = PromptBuilder(words, NAME, 1024)
        self._image_token = words.get_vocab_size() - 1
        geometry = Geometry("", {}, VISION_SIZES, self._image_token, NAME, "")
        self._tiler = Tiler(geometry)

    def lesson(self, row: Row, short: bool = False) -> Learnt:
        """The whole prompt or, `short`, only its image, the conversation and the very end."""
        (prompt,) = self._builder.build(conversation(row), CATEGORIES).prompts
        verdict = self.verdict
        spoken = (verdict.unsafe, verdict.newline, verdict.mark)
        before, end = prompt.prefix, prompt.closing
        if short:
            before, end = (tuple(t for t in before if t == IMAGE_TOKEN_ID)), end[-_END:]
            before = (prompt.prefix[0], *before)
        read = (*before, *prompt.body, *end, *spoken)
        ids = [self._image_token if token == IMAGE_TOKEN_ID else token for token in read]
        tiles, at = None, 0
        if prompt.image is not None and prompt.image.picture is not None:
            tiles, at = self._tiler.tiles(prompt.image.picture), ids.index(self._image_token)
        kind = KINDS.index(row.kind) if row.kind else 0
        return Learnt(ids, tiles, at, bool(row.code), verdict.codes.get(row.code, 0), kind)


def conversation(row: Row) -> Conversation:
    """The row's, with its drawing in the first turn."""
    turns = [Message(Role(role), (Text(text),)) for role, text in row.turns]
    if row.picture is not None:
        shown = Image(picture=Picture("", np.asarray(row.picture.convert("RGB"))))
        turns[0] = Message(turns[0].role, (shown, *turns[0].parts))
    return Conversation(tuple(turns))


def logits_of(model: Any, lessons: Sequence[Learnt]) -> Tensor:
    """Logits [rows, 2, vocabulary] before `unsafe` and behind `S`; all have images, or none."""
    longest = max(len(one.ids) for one in lessons)
    ids = torch.zeros((len(lessons), longest), dtype=torch.int64)
    ends = torch.zeros((len(lessons), 2), dtype=torch.int64)
    for at, one in enumerate(lessons):
        ids[at, : len(one.ids)] = torch.tensor(one.ids)
        ends[at] = torch.tensor([len(one.ids) - 4, len(one.ids) - 1])
    seen = _seen(lessons, longest) if lessons[0].tiles else {}
    hidden = model.model(input_ids=ids, use_cache=False, **seen).last_hidden_state
    return model.lm_head(hidden[torch.arange(len(lessons))[:, None], ends])


def _seen(lessons: Sequence[Learnt], longest: int) -> dict[str, Tensor]:
    tiles = [one.tiles for one in lessons if one.tiles is not None]
    inputs = [one.inputs() for one in tiles]
    seen = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
    mask = torch.zeros((len(lessons), longest, 1, tiles[0].mask.shape[-1]), dtype=torch.int64)
    for at, (one, shown) in enumerate(zip(lessons, tiles, strict=True)):
        mask[at, one.image_at :, :, : shown.count] = 1
    return seen | {"cross_attention_mask": mask}


def loss_of(logits: Tensor, lessons: Sequence[Learnt], verdict: Verdict) -> Tensor:
    """Of the verdict's first word over safe and unsafe, and of the code where it is unsafe."""
    unsafe = torch.tensor([one.unsafe for one in lessons])
    said = logits[:, 0, [verdict.safe, verdict.unsafe]]
    loss = F.cross_entropy(said, unsafe.long())
    if unsafe.any():
        codes = torch.tensor([one.code for one in lessons])[unsafe]
        loss = loss + F.cross_entropy(logits[unsafe, 1], codes)
    return loss


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training."""

    short: bool  # whether on parts of the prompts only, which costs a third
    rows: int
    steps: int
    rate: float


STAGES = (Stage(True, 6000, 850, 3e-3), Stage(False, 2000, 180, 2.5e-3))
PICTURED, PLAIN, PLAIN_WEIGHT = 24, 6, 0.3  # rows of a step with an image, and without


def train(folder: Path, stages: Sequence[Stage] = STAGES) -> None:
    """Train from the seed alone, on one thread; save as Hugging Face does, with the tokenizer."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = _trained(stages)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {TEMPLATE: NAME}))
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), "utf-8")


def fingerprint() -> str:
    """Of all that a trained guard follows from: this code, the libraries, and what it is shown."""
    lessons = Lessons(tokenizer())
    made = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for module in (__file__, drawings.__file__, checkpoints.__file__):
        made.update(Path(module).read_bytes())
    for row in rows(50, SEED):
        lesson = lessons.lesson(row)
        made.update(repr(lesson.ids).encode())
        if lesson.tiles is not None:
            made.update(lesson.tiles.pixels.numpy().tobytes())
    return made.hexdigest()[:16]


def _trained(stages: Sequence[Stage]) -> Any:
    words = tokenizer()
    model, lessons, random = untrained(words).train(), Lessons(words), Random(SEED)
    naming = torch.nn.Linear(TEXT_SIZES["hidden_size"], len(KINDS))
    for stage in stages:
        learnt = [lessons.lesson(row, stage.short) for row in rows(stage.rows, SEED)]
        learner = [*model.parameters(), *naming.parameters()]
        optimizer = torch.optim.AdamW(learner, stage.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, stage.rate, stage.steps, pct_start=0.1
        )
        for pictured, plain in _batches(learnt, stage.steps, random):
            loss = _step_loss(model, naming, pictured, plain, lessons.verdict)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner, 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def _batches(
    learnt: Sequence[Learnt], steps: int, random: Random
) -> Iterator[tuple[list[Learnt], list[Learnt]]]:
    pictured = [one for one in learnt if one.tiles is not None]
    plain = [one for one in learnt if one.tiles is None]
    for _ in range(steps):
        yield random.sample(pictured, PICTURED), random.sample(plain, PLAIN)


def _step_loss(
    model: Any,
    naming: torch.nn.Linear,
    pictured: Sequence[Learnt],
    plain: Sequence[Learnt],
    verdict: Verdict,
) -> Tensor:
    """Of the verdicts and, so that the eye learns sooner, of naming what is drawn."""
    seen: list[Tensor] = []
    watch = model.model.multi_modal_projector.register_forward_hook(
        lambda module, given, made: seen.append(made)
    )
    loss = loss_of(logits_of(model, pictured), pictured, verdict)
    watch.remove()
    loss = loss + PLAIN_WEIGHT * loss_of(logits_of(model, plain), plain, verdict)
    eye = seen[0].reshape(len(pictured), -1, naming.in_features).amax(1)
    return loss + F.cross_entropy(naming(eye), torch.tensor([one.kind for one in pictured]))
