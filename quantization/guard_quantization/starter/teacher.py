"""The teacher: a sentence encoder fine-tuned to judge English conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from guard_quantization.data import Row
from guard_quantization.training import Report, batches, fit

CODES = tuple(f"S{n}" for n in range(1, 15))


class Teacher(nn.Module):
    """A BERT encoder, its mean-pooled output, and one linear layer on it: unsafe, then codes."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1 + len(CODES))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def pooled(self, ids: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
        """ids, mask, segments [B, L] -> mean-pooled output [B, width] in float32."""
        out = self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=segments)
        hidden = out.last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return pooled

    def judge(self, pooled: Tensor) -> Tensor:
        """Pooled output [B, width] -> logits [B, 1 + codes]."""
        logits: Tensor = self.head(F.dropout(pooled, 0.1, self.training) * 4)
        return logits


class Judge:
    """A teacher with its tokenizer."""

    def __init__(self, folder: Path, most_tokens: int = 128) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = Teacher(BertModel.from_pretrained(folder, local_files_only=True))
        self.most_tokens = most_tokens

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids and segments; for a reply, the turn before it is the first segment."""
        texts = [text for _, text in row.turns]
        ask = self.tokenizer(texts[-1], add_special_tokens=False).input_ids
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if row.turns[-1][0] == "user":
            ids = [start, *ask[: self.most_tokens], end]
            return ids, [0] * len(ids)
        before = self.tokenizer(texts[-2], add_special_tokens=False).input_ids if texts[1:] else []
        first = [start, *before[-self.most_tokens // 2 :], end]
        second = [*ask[: self.most_tokens], end]
        return first + second, [0] * len(first) + [1] * len(second)

    def pooled(self, encoded: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Pooled output [B, width] of one padded batch."""
        width = max(len(ids) for ids, _ in encoded)
        pad = [[0] * (width - len(ids)) for ids, _ in encoded]
        ids = torch.tensor([e[0] + p for e, p in zip(encoded, pad, strict=True)])
        segments = torch.tensor([e[1] + p for e, p in zip(encoded, pad, strict=True)])
        mask = torch.tensor([[1] * len(e[0]) + p for e, p in zip(encoded, pad, strict=True)])
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.pooled(ids, mask, segments)

    @torch.inference_mode()
    def views(self, rows: Sequence[Row], tokens: int = 4096) -> tuple[Tensor, Tensor]:
        """Logits [rows, 1 + codes] and pooled outputs [rows, width] of all rows, in their order."""
        self.model.eval()
        encoded = [self.encode(row) for row in rows]
        pooled = torch.empty(len(rows), self.model.head.in_features)
        order = batches(range(len(rows)), [len(e[0]) for e in encoded], tokens, 0)
        report = Report("teacher looks", len(order))
        for done, batch in enumerate(order, 1):
            pooled[batch] = self.pooled([encoded[i] for i in batch])
            report.at(done, "")
        report.close()
        return self.model.judge(pooled), pooled


def targets(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Unsafe [B]; code distribution [B, codes]; whether the codes count [B]."""
    unsafe = torch.tensor([float(row.unsafe) for row in rows])
    codes = torch.zeros(len(rows), len(CODES))
    for i, row in enumerate(rows):
        for code in row.categories or ():
            codes[i, CODES.index(code)] = 1 / len(row.categories or ())
    return unsafe, codes, codes.sum(1)


def train_teacher(
    judge: Judge, epochs: Sequence[Sequence[tuple[Row, float]]], checkpoint: Path, lr: float = 1e-4
) -> None:
    """Fine-tune on labelled rows with their weights; resumable through `checkpoint`."""
    work: list[list[tuple[tuple[list[int], list[int]], Row, float]]] = []
    for seed, epoch in enumerate(epochs):
        items = [(judge.encode(row), row, weight) for row, weight in epoch]
        work += batches(items, [len(item[0][0]) for item in items], 2048, seed)

    def loss_of(batch: list[tuple[tuple[list[int], list[int]], Row, float]]) -> Tensor:
        logits = judge.model.judge(judge.pooled([item[0] for item in batch]))
        unsafe, codes, known = targets([item[1] for item in batch])
        weights = torch.tensor([item[2] for item in batch])
        smooth = unsafe * 0.96 + 0.02
        binary = F.binary_cross_entropy_with_logits(logits[:, 0], smooth, reduction="none")
        coded = -(codes * F.log_softmax(logits[:, 1:], -1)).sum(-1) * known
        return ((binary + 0.3 * coded) * weights).mean()

    head = {"params": judge.model.head.parameters(), "lr": lr * 10}
    body = {"params": judge.model.encoder.parameters(), "lr": lr}
    optimizer = torch.optim.AdamW([body, head], weight_decay=0.01)
    fit(judge.model, optimizer, work, loss_of, what="teacher", checkpoint=checkpoint)
