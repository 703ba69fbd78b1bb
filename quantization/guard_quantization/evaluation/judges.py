"""Whoever judges rows here: an artifact's engine, or a checkpoint folder without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from guard_policies.assessment import Assessment
from guard_quantization.checkpoint.beliefs import Asker, official_template
from guard_quantization.checkpoint.comparison import READS, alike, verdict_logits
from guard_quantization.checkpoint.importance import batched
from guard_quantization.checkpoint.streaming import streamed
from guard_quantization.checkpoint.tensors import (
    EMBEDDING,
    HEAD,
    Tensors,
    check_tensors,
    parameters,
    read_config,
    shape_of,
)
from guard_quantization.evaluation.evaluate import Judge
from guard_quantization.stages import digest
from guard_service.engines import Assessed, ModelCard, open_engine
from guard_service.engines.plans import PLANS, STORED
from guard_service.prompt import Prompt, PromptBuilder


class CheckpointJudge:
    """A checkpoint folder, whole or pruned, in float32, with the memory of one layer."""

    def __init__(
        self, folder: Path, template: str = "", window_tokens: int = 512, tokens: int = 8192
    ) -> None:
        """`template` "": the one that fits its config.json. Raises ExportError, ValueError."""
        config = read_config(folder)
        name = template or official_template(config)
        self._asker = asker = Asker.of(folder, name, window_tokens)
        self._tensors, self._tokens = Tensors(folder), tokens
        check_tensors(self._tensors, config)
        self._model = streamed(config, self._tensors.read)
        rows = self._tensors.read(EMBEDDING if shape_of(config).tied else HEAD)
        self._rows = (rows if "verdict_head" in config else rows[list(asker.head)]).float()
        codes = tuple(category.code for category in asker.known)
        self.card = ModelCard(
            name=folder.name,
            digest=f"sha256:{digest(folder)}",
            engine="torch",
            template=name,
            categories=codes,
            custom_categories=asker.builder.template.takes_categories,
            judges_images=False,
            window_tokens=window_tokens,
            parameters=parameters(config),
        )

    def prompt_builder(self) -> PromptBuilder:
        """See Engine."""
        return self._asker.builder

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """See Engine."""
        verdict = self._asker.verdict
        spoken = (verdict.unsafe, verdict.newline, verdict.mark)
        rows = [[*one.prefix, *one.body, *one.closing, *spoken] for one in prompts]
        logits = torch.zeros(len(rows), len(READS), len(self._rows), dtype=torch.float64)
        for own in alike(rows):
            batches = batched([rows[at] for at in own], self._tokens)
            logits[own] = verdict_logits(self._model, self._rows, batches, share=True).double()
        return [
            Assessed(self._read(line, prompt.categories), len(row), 0)
            for line, prompt, row in zip(logits, prompts, rows, strict=True)
        ]

    def _read(self, logits: Tensor, codes: Sequence[str]) -> Assessment:
        """From logits [reads, head]."""
        head, verdict = self._asker.head, self._asker.verdict
        margin = logits[0, head.index(verdict.unsafe)] - logits[0, head.index(verdict.safe)]
        unsafe = torch.sigmoid(margin).item()
        columns = [head.index(verdict.codes[code]) for code in codes]
        shares = logits[1, columns].softmax(-1).tolist()
        scores: Mapping[str, float] = {
            code: unsafe * share for code, share in zip(codes, shares, strict=True)
        }
        return Assessment(unsafe, scores)

    def close(self) -> None:
        """Let go of the files."""
        self._tensors.__exit__(None, None, None)


def open_judge(
    name: str | Path, template: str = "", window_tokens: int = 512, threads: int = 2
) -> Judge:
    """A checkpoint folder, or what `open_engine` takes, once it has passed its self test.

    `template` and `window_tokens` are of a checkpoint; an artifact knows its own, and may be named
    with a kernel plan: `FOLDER@int8`. Raises ExportError, ArtifactError, EngineFailed.
    """
    model, plan = _planned(name)
    if (Path(model) / "config.json").is_file():
        return CheckpointJudge(Path(model), template, window_tokens)
    engine = open_engine(model, threads, plan=plan)
    engine.self_test()
    return engine


def judge_digest(name: str | Path) -> str:
    """What tells whether `open_judge` opens the same model."""
    model, plan = _planned(name)
    if Path(model).is_dir():
        found = digest(Path(model))
    else:
        with closing(open_engine(model)) as engine:
            found = engine.card.digest
    return found if plan == STORED else f"{plan}-{found.removeprefix('sha256:')}"


def _planned(name: str | Path) -> tuple[str, str]:
    model, _, plan = str(name).rpartition("@")
    return (model, plan) if model and plan in PLANS else (str(name), STORED)
