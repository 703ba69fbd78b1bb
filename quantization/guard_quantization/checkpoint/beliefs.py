"""What a teacher believes of rows: any Llama Guard checkpoint, or any engine; computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from guard_policies.taxonomy import BY_CODE, LLAMA_GUARD_3, Category
from guard_quantization.checkpoint.asking import Asked
from guard_quantization.checkpoint.comparison import READS, alike, verdict_logits
from guard_quantization.checkpoint.importance import batched
from guard_quantization.checkpoint.streaming import load_llama
from guard_quantization.data import cropped
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.export.hf import read_source
from guard_quantization.stages import digest
from guard_quantization.training import Report, save
from guard_service.conversation import Conversation
from guard_service.engines import Engine, open_engine
from guard_service.manifest import Verdict
from guard_service.prompt import Prompt, PromptBuilder
from guard_service.templates import BY_NAME

_CODES = tuple(f"S{number}" for number in range(1, 100))  # that a list may number
TEMPLATE = "guard_template"  # field of config.json: what a checkpoint of our own was trained with
_CHUNK = 1024  # rows whose beliefs are kept in one file
_CONTEXT, _JUDGED = 1000, 3000  # characters of a turn; longer ones keep beginning and end


class Believer(Protocol):
    """A teacher."""

    def beliefs(self, asked: Sequence[Asked]) -> Tensor:
        """[rows, 1 + most listed]: the logit of P(unsafe), then each listed code's share."""
        ...


@dataclass(frozen=True, slots=True)
class Asker:
    """Makes a model's prompts of rows, and knows the rows of its output layer."""

    builder: PromptBuilder
    verdict: Verdict
    known: tuple[Category, ...]  # what the template lists when nobody chooses

    @classmethod
    def of(cls, folder: Path, template: str, window_tokens: int) -> Asker:
        """Of a checkpoint folder. Raises ExportError, and ValueError for an unknown template."""
        tokenizer = read_source(folder).tokenizer
        builder = PromptBuilder(tokenizer, template, window_tokens)
        wording = BY_NAME[template].wording
        known = tuple(category for category in LLAMA_GUARD_3 if category.code in wording)
        return cls(builder, verdict_tokens(tokenizer, codes_of(template)), known)

    @property
    def head(self) -> tuple[int, ...]:
        """Token ids of the output rows that are read, in order."""
        return self.verdict.head

    def prompt(self, asked: Asked) -> Prompt:
        """The prompt that judges the row; of several windows, the last."""
        return _prompt(self.builder, asked)

    def ids(self, asked: Asked) -> list[int]:
        """The whole model input, with the verdict's tokens up to "S" behind it."""
        prompt, verdict = self.prompt(asked), self.verdict
        spoken = (verdict.unsafe, verdict.newline, verdict.mark)
        return [*prompt.prefix, *prompt.body, *prompt.closing, *spoken]

    def columns(self, asked: Asked) -> list[int]:
        """Where the listed codes are in `head`."""
        tokens = [self.verdict.codes[category.code] for category in asked.categories]
        return [self.head.index(token) for token in tokens]


def codes_of(template: str) -> tuple[str, ...]:
    """Codes that the output layer has rows for: all that a list may number, or those of the only
    list that there is."""
    found = BY_NAME[template]
    return _CODES if found.takes_categories else tuple(found.wording)


class CheckpointTeacher:
    """A Llama Guard checkpoint folder, held in memory in bfloat16."""

    def __init__(self, folder: Path, template: str, window_tokens: int, tokens: int = 4096) -> None:
        self._asker = Asker.of(folder, template, window_tokens)
        self._model = load_llama(folder, torch.bfloat16)
        self._tokens = tokens
        rows = self._model.lm_head.weight.data.float()
        cut = len(rows) == len(self._asker.head)
        self._rows = rows if cut else rows[list(self._asker.head)]

    def beliefs(self, asked: Sequence[Asked]) -> Tensor:
        """See Believer."""
        head, verdict = self._asker.head, self._asker.verdict
        safe, unsafe = head.index(verdict.safe), head.index(verdict.unsafe)
        logits = torch.zeros(len(asked), len(READS), len(head), dtype=torch.float64)
        ids = [self._asker.ids(one) for one in asked]
        for own in alike(ids):
            batches = batched([ids[at] for at in own], self._tokens)
            rows = self._rows.bfloat16()
            logits[own] = verdict_logits(self._model, rows, batches, share=True).double()
        found = torch.zeros(len(asked), 1 + max(len(one.categories) for one in asked))
        for at, one in enumerate(asked):
            found[at, 0] = logits[at, 0, unsafe] - logits[at, 0, safe]
            shares = logits[at, 1, self._asker.columns(one)].softmax(-1)
            found[at, 1 : 1 + len(shares)] = shares
        return found


class EngineTeacher:
    """An engine, for example an artifact: with its own prompts and its calibration."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._builder = engine, engine.prompt_builder()

    def beliefs(self, asked: Sequence[Asked]) -> Tensor:
        """See Believer. Raises ValueError for renumbered lists that the template cannot make.

        A model whose list never changes is asked for the listed categories: its P(unsafe) is the
        sum of their scores.
        """
        card = self._engine.card
        fixed = not BY_NAME[card.template].takes_categories
        if fixed and any(BY_CODE.get(c.code) != c for one in asked for c in one.categories):
            raise ValueError(
                f"the teacher {card.name} lists the same categories always: set distill.shuffle "
                "to 0, or take another teacher"
            )
        found = torch.zeros(len(asked), 1 + max(len(one.categories) for one in asked))
        prompts = [_prompt(self._builder, one) for one in asked]
        for at, assessed in enumerate(self._engine.assess(prompts)):
            scores = assessed.assessment.category_scores
            shares = torch.tensor([scores.get(c.code, 0.0) for c in asked[at].categories])
            unsafe = shares.sum() if fixed else torch.tensor(assessed.assessment.unsafe_score)
            found[at, 0] = torch.logit(unsafe.double(), eps=1e-6)
            found[at, 1 : 1 + len(shares)] = shares / shares.sum().clamp(min=1e-12)
        return found


def open_teacher(name: str, window_tokens: int) -> tuple[str, Callable[[], Believer]]:
    """A teacher's digest, and what loads it: a checkpoint folder, or what `open_engine` takes.

    A checkpoint is asked with the official template of its size.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file():
        engine = open_engine(name, threads=2)
        return engine.card.digest, lambda: EngineTeacher(engine)
    template = official_template(read_source(folder).config)
    return digest(folder), lambda: CheckpointTeacher(folder, template, window_tokens)


def official_template(config: Mapping[str, Any]) -> str:
    """The template of the published model that a checkpoint's config.json looks like.

    One of our own says which it was trained with. Raises ValueError when that is unknown.
    """
    if named := config.get(TEMPLATE):
        if not isinstance(named, str) or named not in BY_NAME:
            raise ValueError(f"config.json: {TEMPLATE} is unknown; known: {', '.join(BY_NAME)}")
        return named
    layers = config.get("num_hidden_layers", 0)
    return "llama-guard-3-8b" if layers >= 32 else "llama-guard-3-1b"


def believed(teacher: Believer | None, asked: Sequence[Asked], folder: Path) -> Tensor | None:
    """The teacher's beliefs of all rows, kept in `folder` piece by piece; None without a teacher.

    Pieces are named by the rows they are of; one that is there is not computed again. The folder is
    one teacher's.
    """
    if teacher is None or not asked:
        return None
    whole = torch.zeros(len(asked), 1 + max(len(one.categories) for one in asked))
    report = Report("teacher believes", len(asked))
    try:
        for begin in range(0, len(asked), _CHUNK):
            part = asked[begin : begin + _CHUNK]
            path = folder / f"{_key(part)}.pt"
            if not path.exists():
                save(path, {"beliefs": teacher.beliefs(part)})
            told = torch.load(path, weights_only=True)["beliefs"]
            whole[begin : begin + len(part), : told.shape[1]] = told
            report.at(begin + len(part), "")
    finally:
        report.close()
    return whole


def _key(asked: Sequence[Asked]) -> str:
    digest = hashlib.sha256()
    for one in asked:
        codes = [(category.code, category.name) for category in one.categories]
        digest.update(f"{one.row.id} {one.row.turns} {codes}\n".encode())
    return digest.hexdigest()


def _prompt(builder: PromptBuilder, asked: Asked) -> Prompt:
    *context, (role, text) = asked.row.turns
    turns = [(who, cropped(said, _CONTEXT)) for who, said in context]
    conversation = Conversation.of(*turns, (role, cropped(text, _JUDGED)))
    return builder.build(conversation, asked.categories).prompts[-1]
