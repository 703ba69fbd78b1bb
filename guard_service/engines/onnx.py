"""An artifact in onnxruntime: every score from one forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard_policies.taxonomy import BY_CODE, Category
from guard_service.artifact import Artifact
from guard_service.conversation import Conversation
from guard_service.engines import (
    SESSION_BYTES,
    Assessed,
    Engine,
    EngineFailed,
    ModelCard,
    Session,
)
from guard_service.engines.golden import difference
from guard_service.engines.loading import Graph, open_graph
from guard_service.engines.plans import STORED
from guard_service.engines.prepared import Prepared
from guard_service.engines.scoring import Scoring, alike
from guard_service.engines.sessions import SnapshotSession
from guard_service.engines.snapshots import Past, Snapshot, Snapshots
from guard_service.manifest import Golden, Manifest
from guard_service.prompt import Prompt, PromptBuilder
from guard_service.tokenizer import load_tokenizer

_SNAPSHOT_BYTES = 256 * 2**20


class OnnxEngine(Engine):
    """A small Llama guard, read as `engines.scoring` tells.

    A prompt's scores do not depend on the others of a batch.

    Keys and values of a prefix are computed once and kept (`prefix_cache`), and those of a growing
    conversation in its session, all sessions together within `session_bytes`. `plan` names the
    kernels that multiply the weights (`engines.plans`). Each of the lanes has `threads` of its own,
    and so many calls may run at once. `device` is `cpu` or `cuda`.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int = 1,
        prefix_cache: bool = True,
        snapshot_bytes: int = _SNAPSHOT_BYTES,
        session_bytes: int = SESSION_BYTES,
        *,
        plan: str = STORED,
        lanes: int = 1,
        prepared: Prepared | None = None,
        device: str = "cpu",
    ) -> None:
        """Raises EngineFailed when the graph cannot be loaded or does not fit the manifest."""
        manifest = artifact.manifest
        self.card = _card(artifact, plan)
        self.lanes = lanes
        self._manifest = manifest
        self._builder = _builder(artifact)
        self._free: SimpleQueue[Graph] = SimpleQueue()
        for _ in range(lanes):
            graph = open_graph(artifact, plan, threads, prepared or Prepared(None), device)
            _check_graph(graph.session, manifest)
            self._free.put(graph)
        positions = manifest.geometry.max_positions
        self._scoring = Scoring(manifest.verdict, manifest.calibration, positions)
        self._snapshots = Snapshots[Snapshot](snapshot_bytes) if prefix_cache else None
        self._sessions = Snapshots[Snapshot](session_bytes)
        self._no_past = _no_past(manifest)
        self._present = [name.replace("past", "present") for name in self._no_past]

    def prompt_builder(self) -> PromptBuilder:
        """The builder of this model's prompts; thread-safe."""
        return self._builder

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """One result per prompt, in order. Raises EngineFailed for the whole batch."""
        for prompt in prompts:
            self._check(prompt)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for at, prompt in enumerate(prompts):
            groups[prompt.prefix if self._snapshots is not None else ()].append(at)
        results: dict[int, Assessed] = {}
        for prefix, members in groups.items():
            snapshot, computed = self._snapshot(prefix)
            rows = {at: self._row(prompts[at], len(prefix)) for at in members}
            for batch in alike(rows):
                logits, _ = self._run([rows[at] for at in batch], snapshot.past)
                for at, pair in zip(batch, logits, strict=True):
                    assessment = self._scoring.assessment(prompts[at], pair)
                    cached = len(snapshot.ids) - computed
                    results[at] = Assessed(assessment, len(rows[at]) + computed, cached)
                    computed = 0  # the first prompt pays for a new snapshot
        return [results[at] for at in range(len(prompts))]

    def session(self) -> Session:
        """A session; it keeps what it may of `session_bytes`."""
        return SnapshotSession(self._sessions, self._grow)

    @property
    def session_bytes(self) -> int:
        """What sessions hold now."""
        return self._sessions.size

    @property
    def sessions_crowded_out(self) -> int:
        """How often a session's state was dropped for want of room."""
        return self._sessions.crowded_out

    def score(self, turns: Sequence[tuple[str, str]]) -> Golden:
        """Score a conversation by the model's own categories, as a golden prompt records it.

        A conversation of several windows counts as its worst.
        """
        prompts = self._builder.build(Conversation.of(*turns), self._categories()).prompts
        found = max(
            (assessed.assessment for assessed in self.assess(prompts)),
            key=lambda assessment: assessment.unsafe_score,
        )
        return Golden(tuple(turns), found.unsafe_score, dict(found.category_scores))

    def self_test(self) -> None:
        """Score the golden prompts; raises EngineFailed when there are none, or scores differ."""
        if not self._manifest.golden:
            raise EngineFailed("the artifact has no golden prompts; it cannot be verified")
        worst = 0.0
        for golden in self._manifest.golden:
            worst = max(worst, difference(self.score(golden.turns), golden))
        if not worst <= self._manifest.tolerance:
            raise EngineFailed(
                f"golden prompts score up to {worst:.3f} differently than when the artifact was "
                f"made (tolerance {self._manifest.tolerance}); this machine's answers are not its"
            )

    def close(self) -> None:
        """Free the model's memory; the engine is not used afterwards."""
        if self._snapshots is not None:
            self._snapshots.clear()
        self._sessions.clear()
        with suppress(Empty):  # a run in progress, which may hang, keeps its own
            while True:
                self._free.get_nowait()

    def _categories(self) -> list[Category]:
        return [BY_CODE[code] for code in self._manifest.categories]

    def _check(self, prompt: Prompt) -> None:
        if prompt.image is not None:
            raise EngineFailed("this model cannot judge images")
        self._scoring.check(prompt)

    def _row(self, prompt: Prompt, cached: int) -> list[int]:
        prefix = () if cached else prompt.prefix
        return [*prefix, *prompt.body, *prompt.closing, *self._scoring.spoken]

    def _snapshot(self, prefix: tuple[int, ...]) -> tuple[Snapshot, int]:
        """The state behind a prefix, and how many tokens had to be computed for it."""
        if self._snapshots is None or not prefix:
            return Snapshot((), self._no_past), 0
        known = self._snapshots.get(prefix)
        if known is not None:
            return known, 0
        feeds = {"ids": np.array([prefix], np.int64), "read": np.zeros((1, 1), np.int64)}
        present = self._call(self._present, {**feeds, **self._no_past})
        snapshot = Snapshot(prefix, dict(zip(self._no_past, present, strict=True)))
        self._snapshots.put(prefix, snapshot)
        return snapshot, len(prefix)

    def _grow(self, prompt: Prompt, held: Snapshot | None) -> tuple[Assessed, Snapshot]:
        """Score a prompt whose first tokens `held` may hold, and the state behind its body."""
        self._check(prompt)
        ids, computed = prompt.prefix + prompt.body, 0
        kept = held.shared(ids) if held is not None else 0
        if held is None or kept < len(prompt.prefix):
            held, computed = self._snapshot(prompt.prefix)
            kept = len(held.ids)
        past = held.first(kept)
        row = [*ids[kept:], *prompt.closing, *self._scoring.spoken]
        logits, present = self._run([row], past, keep=True)
        assessed = Assessed(
            self._scoring.assessment(prompt, logits[0]), len(row) + computed, kept - computed
        )
        return assessed, Snapshot(ids, past, present)

    def _run(
        self, rows: Sequence[Sequence[int]], past: Past, keep: bool = False
    ) -> tuple[NDArray[np.float32], Past]:
        """Logits [rows, 2, head]: at the last token of the closing, and at `S`; with `keep`, the
        rows' own keys and values."""
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
        ends = np.array([len(row) - 1 for row in rows], np.int64)
        read = np.stack([ends - 3, ends], axis=1)
        names = ["logits", *(self._present if keep else ())]
        logits, *present = self._call(names, {"ids": ids, "read": read, **past})
        if not np.isfinite(logits).all():
            raise EngineFailed("the model's logits are not finite")
        return logits, dict(zip(self._no_past, present, strict=keep))

    def _call(self, names: list[str], feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
        graph = self._free.get()
        try:
            outputs: list[Any] = graph.session.run(names, feeds)
        except Exception as error:  # onnxruntime's errors share no base class
            raise EngineFailed(f"onnxruntime: {type(error).__name__}") from error
        finally:
            self._free.put(graph)
        return outputs


def _card(artifact: Artifact, plan: str) -> ModelCard:
    manifest = artifact.manifest
    return ModelCard(
        name=manifest.name,
        digest=artifact.digest,
        engine="onnx",
        plan=plan,
        template=manifest.template,
        categories=manifest.categories,
        custom_categories=manifest.custom_categories,
        custom_codes=tuple(manifest.verdict.codes) if manifest.custom_categories else (),
        judges_images=False,
        window_tokens=manifest.window_tokens,
        parameters=manifest.parameters,
        notice=manifest.notice,
    )


def _builder(artifact: Artifact) -> PromptBuilder:
    manifest = artifact.manifest
    tokenizer = load_tokenizer(artifact.tokenizer)
    if tokenizer.get_vocab_size(with_added_tokens=True) > manifest.geometry.vocab:
        raise EngineFailed("the tokenizer has more tokens than the model")
    return PromptBuilder(tokenizer, manifest.template, manifest.window_tokens)


def _no_past(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    g = manifest.geometry
    nothing = np.zeros((1, g.kv_heads, 0, g.head_dim), np.float32)
    return {f"past_{kind}.{layer}": nothing for layer in range(g.layers) for kind in "kv"}


def _check_graph(graph: Any, manifest: Manifest) -> None:
    """The graph's inputs and outputs are those of the manifest's geometry."""
    wanted = {"ids", "read", *_no_past(manifest)}
    found = {value.name for value in graph.get_inputs()}
    if found != wanted:
        raise EngineFailed("the graph's inputs do not fit the manifest's geometry")
    outputs = {value.name: value.shape for value in graph.get_outputs()}
    if outputs.get("logits", [None])[-1] != len(manifest.verdict.head):
        raise EngineFailed("the graph's logits do not fit the manifest's head")
