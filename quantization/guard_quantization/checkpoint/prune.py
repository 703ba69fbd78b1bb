"""One-shot structured pruning: fewer layers, narrower MLPs, fewer groups and channels, a cut head.

Each step measures the model that the step before left, cuts what does least, and is compared with
the unpruned model on rows that were not measured. No weights are changed but those of norms, when
channels go. Models are streamed: the memory is one layer in float32, the activations of a batch,
and the embedding table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from guard_quantization.checkpoint.comparison import READS, agreement, verdict_logits
from guard_quantization.checkpoint.cut import Cut, kept_layers, largest, norm_factors, rounded
from guard_quantization.checkpoint.importance import Batch, Importance, batched, measure
from guard_quantization.checkpoint.streaming import streamed
from guard_quantization.checkpoint.tensors import (
    HEAD,
    Entry,
    Tensors,
    check_tensors,
    copy_companions,
    layout,
    read_config,
    shape_of,
    write_tensors,
)
from guard_quantization.export.decoder import ExportError, Shape
from guard_quantization.folders import check_room, read_json, write_json
from guard_quantization.training import Report
from guard_service.artifact import fresh_folder

_SHORTEST = 8  # tokens that a row may be cut to
_SIZES = {  # of a plan, and what of a checkpoint bounds them
    "layers": "layers",
    "intermediate_size": "mlp",
    "kv_groups": "kv_heads",
    "hidden_size": "hidden",
    "keep_first": "layers",
    "keep_last": "layers",
}


class PruneError(ExportError):
    """A plan or calibration rows that do not go with the checkpoint; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What is kept. A size of 0 keeps everything; widths are rounded up to a multiple of 32."""

    layers: int = 0
    intermediate_size: int = 0
    kv_groups: int = 0  # key-value heads, each with the queries that use it
    hidden_size: int = 0
    keep_first: int = 1  # layers at either end that stay whatever they do
    keep_last: int = 1
    head: bool = True  # cut the output layer to the verdict tokens
    rows: int = 128  # calibration rows that importance is measured on
    held_back: int = 32  # and further rows, on which each step is compared with the unpruned model
    tokens: int = 1024  # of a row; longer rows lose what follows their first token
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 0) for name in _SIZES),
            ("rows", 1),
            ("held_back", 1),
            ("tokens", _SHORTEST),
            ("batch_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise PruneError(f"prune.{name} is {getattr(self, name)}, must be at least {least}")
        if self.layers and self.layers < self.keep_first + self.keep_last:
            raise PruneError("prune.layers is less than keep_first and keep_last together")

    def check(self, shape: Shape) -> None:
        """Raises PruneError naming the first field that is beyond what a checkpoint has."""
        for name, field in _SIZES.items():
            value, most = getattr(self, name), getattr(shape, field)
            if value > most:
                raise PruneError(f"prune.{name} is {value}, must be 0 to {most}")


def prune(
    source: Path,
    folder: Path,
    plan: PrunePlan,
    calibration: Sequence[Sequence[int]],
    head: Sequence[int] | None,
    report: Callable[[str, int], Report] = Report,
    progress: Path | None = None,
) -> dict[str, Any]:
    """Prune the checkpoint folder `source` into the new checkpoint folder `folder`.

    `calibration` rows are prompts with the verdict's `unsafe`, newline and `S` behind them, in
    random order: the first `plan.rows` are measured, the next `plan.held_back` compared. `head` is
    the order of `quantize.verdict_tokens` (`safe` first, then `unsafe`); None for a source whose
    head is cut already. With `progress`, a file, an interrupted run goes on behind the last step
    that was finished; the file is left to the caller. Returns figures for reports and plots:
    `steps` with the loss of agreement (see `comparison.agreement`), `blocks`, and what was measured
    for each cut.

    Raises ExportError for a checkpoint that is not a sound Llama, PruneError for a plan, rows or a
    head that do not go with it, FileExistsError, OSError; `folder` is then not there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    config = read_config(source)
    plan.check(shape_of(config))
    tokens = _head(config, head)
    measured, held = _rows(plan, calibration, shape_of(config).vocab)
    tensors = Tensors(source)
    with tensors:
        with _shown(report, "checking weights", len(tensors.names())) as done:
            entries = check_tensors(tensors, config, done)
        check_room(folder, _bytes(config, plan, tokens, entries[0].dtype))
        work = _Pruning(tensors, entries, config, tokens, plan, measured, held, report)
        if progress:
            used = [list(row) for row in calibration[: plan.rows + plan.held_back]]
            work.resume(progress, _key(source, config, plan, tokens, used))
        work.run()
        work.write(folder)
    return work.figures


class _Pruning:
    """One run: the cut so far, and what was seen on the way."""

    def __init__(
        self,
        tensors: Tensors,
        entries: Sequence[Entry],
        config: Mapping[str, Any],
        head: tuple[int, ...],
        plan: PrunePlan,
        measured: list[Batch],
        held: list[Batch],
        report: Callable[[str, int], Report],
    ) -> None:
        self.tensors, self.head, self.plan, self.report = tensors, head, plan, report
        self.measured, self.held = measured, held
        self.dtypes = {entry.name: entry.dtype for entry in entries}
        self.shape, self.is_cut = shape_of(config), "verdict_head" in config
        self.cut = Cut.nothing(config)
        self.figures: dict[str, Any] = {"steps": []}
        self.progress: Path | None = None
        self.key = ""

    def run(self) -> None:
        """All steps of the plan that are not done yet, in order."""
        plan, shape = self.plan, self.shape
        if not self.figures["steps"]:
            self.reference = self._logits("source")
            self._record("source", self.reference)
        for name, wanted, most, cut in (
            ("depth", plan.layers, shape.layers, self._depth),
            ("mlp", rounded(plan.intermediate_size, shape.mlp), shape.mlp, self._mlp),
            ("groups", plan.kv_groups, shape.kv_heads, self._groups),
            ("hidden", rounded(plan.hidden_size, shape.hidden), shape.hidden, self._hidden),
        ):
            if wanted not in (0, most) and not self._done(name):
                self.cut = cut(wanted, self._measure(name))
                self._record(name, self._logits(name))
        if plan.head and not self.is_cut and not self._done("head"):
            before = self.figures["steps"][-1]  # the same rows are read as before
            self.cut = replace(self.cut, head=self.head)
            self.figures["steps"].append({**before, "step": "head", **self._size()})

    def write(self, folder: Path) -> None:
        """The smaller checkpoint, with its tokenizer and papers."""
        entries = self._entries()
        with fresh_folder(folder) as made, _shown(self.report, "writing", len(entries)) as done:
            write_json(made / "config.json", self.cut.config())
            copy_companions(self.tensors.folder, made)
            write_tensors(made, entries, partial(self.cut.read, self.tensors), done=done)

    def _depth(self, count: int, measured: Importance) -> Cut:
        layers = kept_layers(measured.blocks, count, self.plan.keep_first, self.plan.keep_last)
        self.figures["kept_layers"] = list(layers)
        return replace(self.cut, layers=layers)

    def _mlp(self, width: int, measured: Importance) -> Cut:
        kept = largest(measured.neurons, width)
        self.figures["neurons"] = _spread(measured.neurons, kept)
        return replace(self.cut, neurons=kept)

    def _groups(self, count: int, measured: Importance) -> Cut:
        kept = largest(measured.groups, count)
        self.figures["groups"] = measured.groups.tolist()
        self.figures["kept_groups"] = kept.tolist()
        return replace(self.cut, groups=kept)

    def _hidden(self, width: int, measured: Importance) -> Cut:
        kept = largest(measured.channels, width)
        self.figures["channels"] = _spread(measured.channels[None], kept[None])
        return replace(self.cut, channels=kept, norms=norm_factors(measured, kept))

    def _measure(self, name: str) -> Importance:
        with _shown(self.report, f"measuring for {name}", len(self.measured)) as done:
            found: Importance = measure(self._model(), self.measured, done)
        self.figures.setdefault("blocks", found.blocks.tolist())
        return found

    def _logits(self, name: str) -> Tensor:
        """Verdict logits of the held-back rows, by the cut as it is."""
        whole = self.cut if self.is_cut else replace(self.cut, head=self.head)
        rows = whole.read(self.tensors, HEAD).float()
        with _shown(self.report, f"comparing {name}", len(self.held)) as done:
            found = verdict_logits(self._model(), rows, self.held, done)
        if not found.isfinite().all():
            raise PruneError(f"after {name}, calibration rows give logits that are not finite")
        return found

    def _model(self) -> LlamaForCausalLM:
        return streamed(self.cut.config(), partial(self.cut.read, self.tensors))

    def _entries(self) -> list[Entry]:
        names = layout(self.cut.config())
        return [Entry(name, size, self.dtypes[self.cut.origin(name)]) for name, size in names]

    def _size(self) -> dict[str, float]:
        entries = self._entries()
        return {
            "parameters": sum(math.prod(entry.shape) for entry in entries),
            "mib": sum(entry.bytes for entry in entries) / 2**20,
        }

    def _done(self, name: str) -> bool:
        return any(step["step"] == name for step in self.figures["steps"])

    def _record(self, name: str, logits: Tensor) -> None:
        compared = agreement(self.reference, logits)
        self.figures["steps"].append({"step": name, **self._size(), **compared})
        if self.progress:
            self._keep(self.progress)

    def _keep(self, progress: Path) -> None:
        """Write down where the run is, so that a file is whole or not there."""
        state = {
            "key": self.key,
            "cut": self.cut.state(),
            "figures": self.figures,
            "reference": self.reference.tolist(),
        }
        progress.parent.mkdir(parents=True, exist_ok=True)
        write_json(progress, state)

    def resume(self, progress: Path, key: str) -> None:
        """Go on from `progress` if that is of the same run, and keep further steps there."""
        self.progress, self.key = progress, key
        if not progress.exists():
            return
        state = read_json(progress)
        if state["key"] == key:
            self.cut = Cut.of_state(self.cut.source, state["cut"])
            self.figures, self.reference = state["figures"], torch.tensor(state["reference"])


def _key(source: Path, config: Mapping[str, Any], plan: PrunePlan, *rows: Sequence[Any]) -> str:
    """A hash of all that a run depends on; weights count by name, size and time of change."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in sorted(source.glob("*.safetensors"))]  # fmt: skip
    whole = json.dumps([config, asdict(plan), files, *rows], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _head(config: Mapping[str, Any], head: Sequence[int] | None) -> tuple[int, ...]:
    """Token ids of the verdict, from the caller or from a source that is cut to them."""
    known: list[int] | None = config.get("verdict_head")
    if head is None and known is None:
        raise PruneError("the checkpoint's head is whole: name the verdict tokens")
    if head is not None and known is not None and list(head) != known:
        raise PruneError("config.json: verdict_head is not the tokenizer's verdict tokens")
    found = tuple(head or known or ())
    vocab = config["vocab_size"]
    if len(found) < 2 or len(set(found)) < len(found) or not 0 <= min(found) <= max(found) < vocab:
        raise PruneError(f"the head must be different token ids below {vocab}, two at least")
    return found


def _bytes(config: Mapping[str, Any], plan: PrunePlan, head: tuple[int, ...], dtype: str) -> int:
    """Of the weights that are left: those of a Llama of the plan's sizes."""
    shape = shape_of(config)
    groups = plan.kv_groups or shape.kv_heads
    sizes = {
        "num_hidden_layers": plan.layers or shape.layers,
        "intermediate_size": rounded(plan.intermediate_size or shape.mlp, shape.mlp),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * shape.group,
        "head_dim": shape.head_dim,
        "hidden_size": rounded(plan.hidden_size or shape.hidden, shape.hidden),
    }
    cut = {"tie_word_embeddings": False, "verdict_head": list(head)} if plan.head else {}
    return sum(Entry(*part, dtype).bytes for part in layout({**config, **sizes, **cut}))


def _rows(
    plan: PrunePlan, calibration: Sequence[Sequence[int]], vocab: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches to measure on and batches to compare on, every row checked."""
    wanted = plan.rows + plan.held_back
    if len(calibration) < wanted:
        raise PruneError(
            f"{len(calibration)} calibration rows; prune.rows and prune.held_back want {wanted}"
        )
    rows = []
    for at, row in enumerate(calibration[:wanted]):
        if len(row) < max(READS) or not 0 <= min(row) <= max(row) < vocab:
            raise PruneError(
                f"calibration row {at} must be {max(READS)} or more token ids below {vocab}"
            )
        most = plan.tokens
        rows.append(list(row) if len(row) <= most else [row[0], *row[1 - most :]])
    measured, held = rows[: plan.rows], rows[plan.rows :]
    return batched(measured, plan.batch_tokens), batched(held, plan.batch_tokens)


def _spread(values: Tensor, kept: Tensor) -> dict[str, Any]:
    """For each row [rows, n]: percentiles 0 to 100, and the share of the sum that is kept."""
    points = torch.linspace(0, 1, 101, dtype=values.dtype)
    share = values.gather(-1, kept).sum(-1) / values.sum(-1).clamp(min=1e-30)
    return {
        "percentiles": torch.quantile(values, points, dim=-1).T.tolist(),
        "kept_share": share.tolist(),
    }


@contextmanager
def _shown(
    report: Callable[[str, int], Report], what: str, steps: int
) -> Iterator[Callable[[int], None]]:
    shown = report(what, steps)
    try:
        yield lambda count: shown.at(count, "")
    finally:
        shown.close()
