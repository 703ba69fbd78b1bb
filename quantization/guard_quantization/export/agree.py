"""Whether an artifact scores as its reference does: every prompt, every category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard_policies.taxonomy import BY_CODE
from guard_quantization.data import probe_rows
from guard_quantization.export.decoder import ExportError
from guard_quantization.training import Report
from guard_service.artifact import Artifact
from guard_service.conversation import Conversation
from guard_service.engines.onnx import OnnxEngine
from guard_service.manifest import Manifest
from guard_service.prompt import Prompt, PromptBuilder
from guard_service.tokenizer import load_tokenizer

Logits = Callable[[Sequence[int]], NDArray[np.float32]]  # of all positions of a row: [L, head]
_BEHIND = (4, 1)  # places from the row's end: behind the closing, and behind `S`


@dataclass(frozen=True, slots=True)
class Scored:
    """P(unsafe), and a score for each category that the prompt lists, in its order."""

    unsafe: float
    categories: tuple[float, ...]


def reference_score(
    manifest: Manifest, prompt: Prompt, logits: Logits, head: Sequence[int]
) -> Scored:
    """A prompt's scores from a reference's logits, by the definition that the engine serves.

    `head` is the token of each column. Raises ExportError when a token of verdicts has none.
    """
    verdict = manifest.verdict
    column = {token: at for at, token in enumerate(head)}
    tokens = (verdict.safe, verdict.unsafe, *(verdict.codes[code] for code in prompt.categories))
    if missing := [token for token in tokens if token not in column]:
        raise ExportError(f"the reference has no logits of token {missing[0]}")
    row = [*prompt.prefix, *prompt.body, *prompt.closing]
    row += [verdict.unsafe, verdict.newline, verdict.mark]
    found = logits(row)
    first, last = (found[len(row) - place].astype(np.float64) for place in _BEHIND)
    margin = float(first[column[verdict.unsafe]] - first[column[verdict.safe]])
    unsafe = manifest.calibration[prompt.direction].probability(margin)
    behind = last[[column[verdict.codes[code]] for code in prompt.categories]]
    shares = np.exp(behind - behind.max())
    return Scored(unsafe, tuple((unsafe * shares / shares.sum()).tolist()))


def reference_scores(
    artifact: Artifact, prompts: Sequence[Prompt], logits: Logits, head: Sequence[int]
) -> list[Scored]:
    """`reference_score` of every prompt."""
    return [reference_score(artifact.manifest, prompt, logits, head) for prompt in prompts]


def plan_scores(
    artifact: Artifact, prompts: Sequence[Prompt], plan: str, threads: int = 1
) -> list[Scored]:
    """What the engine that serves answers by a kernel plan. Raises EngineFailed."""
    report = Report(f"scoring by {plan}", len(prompts))
    with closing(OnnxEngine(artifact, threads, plan=plan)) as engine, closing(report):
        scored = []
        for at, prompt in enumerate(prompts, 1):
            (found,) = engine.assess([prompt])
            codes = found.assessment.category_scores
            categories = tuple(codes[code] for code in prompt.categories)
            scored.append(Scored(found.assessment.unsafe_score, categories))
            report.at(at, "")
    return scored


def agreement(
    prompts: Sequence[Prompt], found: Sequence[Scored], wanted: Sequence[Scored]
) -> dict[str, Any]:
    """How far scores are from the wanted ones, ready for JSON.

    Differences are absolute; a verdict is P(unsafe) of at least one half.
    """
    pairs = list(zip(found, wanted, strict=True))
    apart = [abs(one.unsafe - other.unsafe) for one, other in pairs]
    differ = sum((one.unsafe >= 0.5) != (other.unsafe >= 0.5) for one, other in pairs)
    by_code: dict[str, float] = {}
    for prompt, (one, other) in zip(prompts, pairs, strict=True):
        scores = zip(prompt.categories, one.categories, other.categories, strict=True)
        for code, score, known in scores:
            by_code[code] = max(by_code.get(code, 0.0), abs(score - known))
    return {
        "unsafe": {"max": max(apart), "mean": sum(apart) / len(apart)},
        "categories": {"max": max(by_code.values()), "by_code": by_code},
        "verdicts": {"agree": 1 - differ / len(prompts), "differ": differ},
    }


def probe_prompts(artifact: Artifact, count: int) -> list[Prompt]:
    """Prompts of `count` conversations spread over the packaged probe sets, as the artifact is
    asked; of a conversation of several windows the last."""
    rows = probe_rows()
    taken = rows[:: max(1, len(rows) // count)][:count]
    manifest = artifact.manifest
    builder = PromptBuilder(
        load_tokenizer(artifact.tokenizer), manifest.template, manifest.window_tokens
    )
    categories = [BY_CODE[code] for code in manifest.categories]
    return [builder.build(Conversation.of(*row.turns), categories).prompts[-1] for row in taken]
