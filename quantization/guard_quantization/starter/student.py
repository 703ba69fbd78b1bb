"""The student: a Llama that judges with the serving template, taught by labels and a teacher."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guard_policies.assessment import Direction
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.data import Row, cropped
from guard_quantization.llama import GuardLlama
from guard_quantization.rounding import StoredWeights
from guard_quantization.starter.teacher import CODES, targets
from guard_quantization.training import batches, fit
from guard_service.conversation import Conversation
from guard_service.prompt import PromptBuilder

# Rows of the output layer, in the order of quantize.verdict_tokens.
SAFE_ROW, UNSAFE_ROW, CODE_ROWS, HEAD_ROWS = 0, 1, slice(6, 6 + len(CODES)), 7 + len(CODES)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One row made ready for the student."""

    row: Row
    weight: float
    ids: list[int]  # body, closing, and the verdict's tokens up to "S"
    view: int  # index of the teacher's view, -1 without
    trust: float  # share of the target that is the teacher's belief, the rest is the label


@dataclass(frozen=True, slots=True)
class Crop:
    """Longest texts of a lesson, in characters; longer ones keep their beginning and their end."""

    context: int = 200
    judged: int = 480


class Classroom:
    """Turns rows into lessons: the serving prompt builder, augmentation, the teacher's views."""

    def __init__(
        self,
        builder: PromptBuilder,
        verdict: Sequence[int],
        views: Mapping[str, int],
        trust: float = 0.0,
        crop: Crop = Crop(),
    ) -> None:
        self.builder, self.verdict, self.crop = builder, list(verdict), crop
        self.views, self.trust = views, trust

    def prefix(self, direction: Direction) -> Tensor:
        """Tokens in front of every conversation of that direction."""
        return torch.tensor(self.builder.prefix(direction, LLAMA_GUARD_3))

    def lesson(self, row: Row, weight: float, rng: random.Random | None) -> Lesson:
        """`rng` varies case and final punctuation, which carry no meaning; None leaves the text."""
        context = [(role, cropped(text, self.crop.context)) for role, text in row.turns[:-1]]
        role, text = row.turns[-1]
        judged = cropped(text, self.crop.judged)
        if rng is not None:
            judged = _varied(judged, rng)
        built = self.builder.build(Conversation.of(*context, (role, judged)), LLAMA_GUARD_3)
        prompt = built.prompts[-1]
        ids = [*prompt.body, *prompt.closing, *self.verdict]
        view = self.views.get(row.id, -1)
        trust = 0.0 if view < 0 else self.trust if row.labelled else 1.0
        return Lesson(row, weight, ids, view, trust)


def _varied(text: str, rng: random.Random) -> str:
    way = rng.random()
    if way < 0.12:
        return text.lower()
    if way < 0.16:
        return text[:1].upper() + text[1:]
    if way < 0.18:
        return text.upper()
    if way < 0.26:
        return text.rstrip(".!?")
    if way < 0.28:
        return text + rng.choice(("?", "!", ".", " ?", "!!", "\n"))
    return text


class Student(nn.Module):
    """A GuardLlama and, for training only, a projection to the teacher's pooled output."""

    def __init__(self, llama: GuardLlama, width: int) -> None:
        super().__init__()
        self.llama = llama
        self.project = nn.Linear(llama.shape.hidden_size, width)

    def forward(self, prefix: Tensor, batch: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
        """Logits [B, 2, head] at the end of the closing and at "S"; projections [B, width]."""
        width = max(len(lesson.ids) for lesson in batch)
        rows = torch.tensor([lesson.ids + [0] * (width - len(lesson.ids)) for lesson in batch])
        ends = torch.tensor([len(lesson.ids) - 1 for lesson in batch])
        read = torch.stack([ends - 3, ends], 1)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.llama.states(prefix, rows, read)
            logits = self.llama.lm_head(states)
            projected = self.project(states[:, 0])
        return logits.float(), projected.float()


def verdict_loss(logits: Tensor, batch: Sequence[Lesson], views: Tensor) -> Tensor:
    """Cross-entropy of the verdict and of the first code, per row [B].

    `views` [N, 1 + codes] are the teacher's logits; a lesson's target is its `trust` share of the
    teacher's belief and the rest the label.
    """
    unsafe, codes, known = targets([lesson.row for lesson in batch])
    seen = torch.tensor([lesson.view for lesson in batch])
    has = (seen >= 0).float()
    belief = views[seen.clamp(min=0)].float()
    share = torch.tensor([lesson.trust for lesson in batch])
    unsafe = (unsafe * 0.97 + 0.015) * (1 - share) + torch.sigmoid(belief[:, 0]) * share
    binary = F.binary_cross_entropy_with_logits(
        logits[:, 0, UNSAFE_ROW] - logits[:, 0, SAFE_ROW], unsafe, reduction="none"
    )
    told = belief[:, 1:].softmax(-1)
    mixed = codes * (1 - share)[:, None] + told * share[:, None]
    first = torch.where((known > 0)[:, None], mixed, told)
    counts = unsafe * torch.where(known > 0, torch.ones_like(has), 0.5 * has)
    coded = -(first * F.log_softmax(logits[:, 1, CODE_ROWS], -1)).sum(-1) * counts
    return binary + 0.35 * coded


def feature_loss(projected: Tensor, batch: Sequence[Lesson], pooled: Tensor) -> Tensor:
    """1 - cosine between the student's projection and the teacher's output, per row [B]."""
    seen = torch.tensor([lesson.view for lesson in batch])
    cosine = F.cosine_similarity(projected, pooled[seen.clamp(min=0)].float(), dim=-1)
    return (1 - cosine) * (seen >= 0).float()


def distill(
    student: Student,
    classroom: Classroom,
    epochs: Sequence[Sequence[tuple[Row, float]]],
    views: tuple[Tensor, Tensor],
    checkpoint: Path,
    *,
    lr: float,
    embedding_lr: float,
    tokens: int = 2560,
    quantized_from: float = 0.75,
) -> None:
    """Train on epochs of weighted rows; resumable. The last part sees weights as 4 bits keep them.

    The embeddings have a rate of their own: they come with meaning, and the words of rare rows
    should not be left behind by those of frequent ones.
    """
    logits, pooled = views
    work = list(_work(classroom, epochs, tokens))
    prefixes = {direction: classroom.prefix(direction) for direction in Direction}

    def loss_of(batch: list[Lesson]) -> Tensor:
        found, projected = student(prefixes[batch[0].row.direction], batch)
        weights = torch.tensor([lesson.weight for lesson in batch])
        loss = verdict_loss(found, batch, logits) * weights
        return (loss + feature_loss(projected, batch, pooled)).mean()

    stored = StoredWeights(student.llama)

    def around(step: int, steps: int) -> AbstractContextManager[None]:
        return stored.rounded(step) if step >= quantized_from * steps else nullcontext()

    table = student.llama.model["embed_tokens"].weight
    others = [parameter for parameter in student.parameters() if parameter is not table]
    groups = [{"params": others, "lr": lr}, {"params": [table], "lr": embedding_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    fit(
        student, optimizer, work, loss_of, what="student", checkpoint=checkpoint, around=around,
        warmup=min(150, len(work) // 8), every=100,
    )  # fmt: skip


def _work(
    classroom: Classroom, epochs: Sequence[Sequence[tuple[Row, float]]], tokens: int
) -> Iterator[list[Lesson]]:
    for seed, epoch in enumerate(epochs):
        rng = random.Random(seed)
        lessons = [classroom.lesson(row, weight, rng) for row, weight in epoch]
        made: list[list[Lesson]] = []
        for direction in Direction:
            own = [lesson for lesson in lessons if lesson.row.direction is direction]
            made += batches(own, [len(lesson.ids) for lesson in own], tokens, seed)
        rng.shuffle(made)
        yield from made


@torch.inference_mode()
def judge_rows(
    student: Student, classroom: Classroom, rows: Sequence[Row], tokens: int = 4096
) -> tuple[Tensor, Tensor]:
    """Unsafe logit [rows] and log-probabilities of codes [rows, codes], in the rows' order."""
    student.eval()
    unsafe = torch.empty(len(rows))
    codes = torch.empty(len(rows), len(CODES))
    lessons = [classroom.lesson(row, 1.0, None) for row in rows]
    for direction in Direction:
        own = [at for at, lesson in enumerate(lessons) if lesson.row.direction is direction]
        prefix = classroom.prefix(direction)
        for batch in batches(own, [len(lessons[at].ids) for at in own], tokens, 0):
            logits, _ = student(prefix, [lessons[at] for at in batch])
            unsafe[batch] = logits[:, 0, UNSAFE_ROW] - logits[:, 0, SAFE_ROW]
            codes[batch] = logits[:, 1, CODE_ROWS].log_softmax(-1)
    return unsafe, codes
