"""A checkpoint learns verdicts from a teacher and from labels, with the prompts that serve it.

Teacher and student each read their own template: an official one, or the compact one that a
distilled student is cheaper with. What the teacher believes is computed once and kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from guard_quantization.checkpoint.asking import Asked, Draw, asked
from guard_quantization.checkpoint.beliefs import Asker, Believer, believed
from guard_quantization.checkpoint.comparison import alike, read_states
from guard_quantization.checkpoint.streaming import load_llama
from guard_quantization.checkpoint.tensors import (
    DTYPES,
    EMBEDDING,
    Entry,
    Tensors,
    copy_companions,
    layout,
    read_config,
    write_tensors,
)
from guard_quantization.data import Row
from guard_quantization.folders import write_json
from guard_quantization.rounding import StoredWeights
from guard_quantization.starter.student import SAFE_ROW, UNSAFE_ROW
from guard_quantization.training import batches, fit
from guard_service.artifact import fresh_folder
from guard_service.templates import BY_NAME

_SMOOTH = 0.015  # of a label: no verdict is certain


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillPlan:
    """How a checkpoint is taught."""

    template: str
    window_tokens: int = 512
    lr: float = 2e-5
    warmup: int = 100
    tokens: int = 4096  # padded tokens of a batch that is computed at once
    accumulate: int = 1  # such batches in an optimizer step
    trust: float = 0.7  # share of the teacher's belief in a target, the rest is the label
    code_weight: float = 0.35  # of the loss on the first code, beside the verdict's
    shuffle: float = 0.5  # see asking.Draw
    drop: float = 0.3
    quantized_from: float = 1.0  # share of the steps after which weights are seen in 4 bits
    block: int = 32  # weights that share a scale then
    checkpointing: bool = False  # compute activations twice instead of keeping them
    bfloat16: bool = True  # compute in bfloat16; weights and their updates stay float32
    held_back: int = 256  # rows on which student and teacher are compared, before and after

    def __post_init__(self) -> None:
        if not 0 <= self.trust <= 1:
            raise ValueError("distill.trust must be between 0 and 1")
        if self.tokens < 1 or self.accumulate < 1:
            raise ValueError("distill.tokens and distill.accumulate must be above zero")

    @property
    def draw(self) -> Draw:
        """How the lists of categories are drawn."""
        return Draw(self.shuffle, self.drop)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and what to answer to it."""

    ids: list[int]  # the prompt, and the verdict's tokens up to "S"
    columns: list[int]  # of the head, for the listed codes
    unsafe: float  # target of P(unsafe)
    shares: list[float] | None  # target over the listed codes; None: nobody knows
    weight: float


def distill_checkpoint(
    source: Path,
    folder: Path,
    plan: DistillPlan,
    epochs: Sequence[Sequence[tuple[Row, float]]],
    held: Sequence[Row],
    teacher: Believer | None,
    work: Path,
    kept: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train the checkpoint `source` on epochs of weighted rows into the new folder `folder`.

    `teacher` may be None when `plan.trust` is 0. `work` keeps the training state: an interrupted
    run goes on from there. `kept` keeps the teacher's beliefs, for other runs too; none: `work`.
    Returns figures: the loss's curve, and how far P(unsafe) is
    from the teacher's on `held`, before and after. Raises ExportError, ValueError, FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    if plan.template not in BY_NAME:
        raise ValueError(f"distill.template {plan.template!r} is unknown: {', '.join(BY_NAME)}")
    if (plan.shuffle or plan.drop) and not BY_NAME[plan.template].takes_categories:
        raise ValueError(
            f"the template {plan.template} lists the same categories always: set distill.shuffle "
            "and distill.drop to 0"
        )
    if teacher is None and plan.trust:
        raise ValueError("distill.trust is above 0 and there is no teacher")
    asker = Asker.of(source, plan.template, plan.window_tokens)
    if read_config(source).get("verdict_head", list(asker.head)) != list(asker.head):
        raise ValueError(
            f"{source}: its output layer is cut for another template than {plan.template}"
        )
    model = load_llama(source).to(device)
    cut_head(model, asker.head)
    drawn = _drawn(epochs, asker, plan)
    kept = kept or work / "beliefs"
    asking = [one for epoch in drawn for one in epoch]
    beliefs = believed(teacher if plan.trust else None, asking, kept)
    compared = _Compared(asker, held[: plan.held_back], teacher, kept)
    before = compared.figures(model, plan)
    curve = _train(model, _batched(drawn, beliefs, asker, plan), plan, work / "model.pt", device)
    after = compared.figures(model, plan)
    save_llama(model, source, folder, asker.head)
    return {"curve": curve, "before": before, "after": after, "examples": sum(map(len, drawn))}


def cut_head(model: LlamaForCausalLM, head: Sequence[int]) -> None:
    """Leave the output layer only the rows of `head`, unless it is cut to them already."""
    rows = model.lm_head.weight.data
    if len(rows) == len(head):
        return
    cut = nn.Linear(rows.shape[1], len(head), bias=False, device=rows.device)
    cut.weight.data.copy_(rows[list(head)])
    model.lm_head = cut


def forward(model: LlamaForCausalLM, batch: Sequence[Example], bfloat16: bool = True) -> Tensor:
    """Logits [B, 2, head] in float32: behind the closing, and behind "S"."""
    device = model.lm_head.weight.device
    width = max(len(one.ids) for one in batch)
    ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in batch], device=device)
    ends = torch.tensor([len(one.ids) for one in batch], device=device)
    half = torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
    share = not model.is_gradient_checkpointing  # which computes layers again, without a cache
    with half:
        logits: Tensor = model.lm_head(read_states(model, ids, ends, share))
    return logits.float()


def loss_of(logits: Tensor, batch: Sequence[Example], code_weight: float) -> Tensor:
    """Weighted mean of the cross-entropies of verdict and first code.

    The first code counts by the target of P(unsafe), and only where somebody knows it.
    """
    device = logits.device
    unsafe = torch.tensor([one.unsafe for one in batch], device=device)
    weights = torch.tensor([one.weight for one in batch], device=device)
    margin = logits[:, 0, UNSAFE_ROW] - logits[:, 0, SAFE_ROW]
    loss = F.binary_cross_entropy_with_logits(margin, unsafe, reduction="none")
    for at, one in enumerate(batch):
        if one.shares is not None:
            listed = logits[at, 1, one.columns].log_softmax(-1)
            wanted = torch.tensor(one.shares, device=device)
            loss[at] = loss[at] - code_weight * one.unsafe * (wanted * listed).sum()
    return (loss * weights).mean()


def example(asker: Asker, one: Asked, belief: Tensor | None, trust: float) -> Example:
    """Ids and targets: `trust` of the belief [1 + listed], the rest the label."""
    label = abs(float(one.unsafe) - _SMOOTH)
    known = [float(c.code in one.violated) for c in one.categories] if one.violated else None
    if belief is None or not trust:
        unsafe, shares = label, None if known is None else [x / sum(known) for x in known]
    else:
        unsafe = trust * torch.sigmoid(belief[0]).item() + (1 - trust) * label
        shares = belief[1 : 1 + len(one.categories)].tolist()
        if known is not None:
            shares = [
                trust * told + (1 - trust) * is_it / sum(known)
                for told, is_it in zip(shares, known, strict=True)
            ]
    return Example(asker.ids(one), asker.columns(one), unsafe, shares, one.weight)


def _drawn(
    epochs: Sequence[Sequence[tuple[Row, float]]], asker: Asker, plan: DistillPlan
) -> list[list[Asked]]:
    made = []
    for seed, epoch in enumerate(epochs):
        rng = random.Random(seed)
        made.append([asked(row, weight, asker.known, plan.draw, rng) for row, weight in epoch])
    return made


def _batched(
    drawn: Sequence[Sequence[Asked]], beliefs: Tensor | None, asker: Asker, plan: DistillPlan
) -> list[list[Example]]:
    work: list[list[Example]] = []
    at = 0
    for seed, epoch in enumerate(drawn):
        told = [None] * len(epoch) if beliefs is None else beliefs[at : at + len(epoch)]
        at += len(epoch)
        made = [example(asker, one, b, plan.trust) for one, b in zip(epoch, told, strict=True)]
        work += _batches(made, plan.tokens, seed)
    return work


def _batches(examples: Sequence[Example], tokens: int, seed: int) -> list[list[Example]]:
    """Batches of prompts that begin alike, in random order."""
    made: list[list[Example]] = []
    for places in alike([one.ids for one in examples]):
        own = [examples[at] for at in places]
        made += batches(own, [len(one.ids) for one in own], tokens, seed)
    random.Random(seed).shuffle(made)
    return made


def _train(
    model: LlamaForCausalLM,
    work: Sequence[list[Example]],
    plan: DistillPlan,
    checkpoint: Path,
    device: str,
) -> list[tuple[int, float]]:
    stored = StoredWeights(model, plan.block)

    def around(step: int, steps: int) -> AbstractContextManager[None]:
        return stored.rounded(step) if step >= plan.quantized_from * steps else nullcontext()

    if plan.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    return fit(
        model,
        optimizer,
        work,
        lambda batch: loss_of(forward(model, batch, plan.bfloat16), batch, plan.code_weight),
        what="distill",
        checkpoint=checkpoint,
        warmup=plan.warmup,
        every=100,
        accumulate=plan.accumulate,
        around=around,
    )


class _Compared:
    """P(unsafe) of student and teacher on rows that are not trained on, with the whole list."""

    def __init__(
        self, asker: Asker, rows: Sequence[Row], teacher: Believer | None, place: Path
    ) -> None:
        rng = random.Random(0)
        self._asked = [asked(row, 1.0, asker.known, Draw(), rng) for row in rows]
        self._examples = [example(asker, one, None, 0.0) for one in self._asked]
        self._told = believed(teacher, self._asked, place)

    @torch.no_grad()
    def figures(self, model: LlamaForCausalLM, plan: DistillPlan) -> dict[str, float]:
        model.eval()
        found = torch.zeros(len(self._examples))
        order = range(len(self._examples))
        for batch in batches(order, [len(one.ids) for one in self._examples], plan.tokens, 0):
            logits = forward(model, [self._examples[at] for at in batch], plan.bfloat16)
            found[batch] = (logits[:, 0, UNSAFE_ROW] - logits[:, 0, SAFE_ROW]).sigmoid().cpu()
        labels = torch.tensor([one.unsafe for one in self._asked])
        told = {"accuracy": ((found >= 0.5) == labels).double().mean().item()}
        if self._told is not None:
            belief = torch.sigmoid(self._told[:, 0])
            told["p_unsafe_difference"] = (found - belief).abs().mean().item()
            told["verdict_agreement"] = ((found >= 0.5) == (belief >= 0.5)).double().mean().item()
        return told


def save_llama(model: LlamaForCausalLM, source: Path, folder: Path, head: Sequence[int]) -> None:
    """Write the model as a checkpoint: config and dtype of `source`, the head cut to `head`."""
    config = {**read_config(source), "verdict_head": list(head), "tie_word_embeddings": False}
    state = model.state_dict()
    with Tensors(source) as tensors, fresh_folder(folder) as made:
        dtype = tensors.entry(EMBEDDING).dtype
        entries = [Entry(name, shape, dtype) for name, shape in layout(config)]
        write_json(made / "config.json", config)
        copy_companions(source, made)
        write_tensors(made, entries, lambda name: state[name].to("cpu", DTYPES[dtype]))
