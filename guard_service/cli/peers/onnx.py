"""optimum's plain export in onnxruntime, its keys and values as inputs: greedy until the verdict.

The graph gives logits of every position, as exported. Where the head is cut to the tokens of
verdicts, config.json says which token a column stands for (`verdict_head`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from guard_service.cli.peers import Answer, PeerUnavailable, Question

_PAST = "past_key_values."


class PlainOnnx:
    """Keeps keys and values of the last prefix and feeds them to the next run."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._graph = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        inputs = {value.name: value.shape for value in self._graph.get_inputs()}
        self._nothing = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in inputs.items()
            if name.startswith(_PAST)
        }
        if not self._nothing:
            raise PeerUnavailable(f"{folder}: the graph takes no past; export it with it")
        self._places = "position_ids" in inputs
        self._presents = [name.replace(_PAST, "present.") for name in self._nothing]
        self._head = json.loads((folder / "config.json").read_bytes()).get("verdict_head")
        self._prefix: tuple[int, ...] | None = None
        self._kept: dict[str, NDArray[np.float32]] = self._nothing

    def verdict(self, question: Question, decode: int) -> Answer:
        """See Peer."""
        if question.prefix != self._prefix:
            self._kept, self._prefix = self._nothing, question.prefix
        past = self._kept
        known = next(iter(past.values())).shape[2]
        ids = question.ids[known:]
        logits, past = self._run(ids, past)
        written = [self._token(logits)]
        for _ in range(decode - 1):
            logits, past = self._run([written[-1]], past)
            written.append(self._token(logits))
        self._kept = {
            name: np.ascontiguousarray(values[:, :, : len(question.prefix)])
            for name, values in past.items()
        }
        return Answer(len(ids) + decode - 1, tuple(written))

    def _run(
        self, ids: list[int], past: dict[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        known = next(iter(past.values())).shape[2]
        feeds: dict[str, NDArray[Any]] = {"input_ids": np.array([ids], np.int64), **past}
        feeds["attention_mask"] = np.ones((1, known + len(ids)), np.int64)
        if self._places:
            feeds["position_ids"] = np.arange(known, known + len(ids), dtype=np.int64)[None]
        logits, *present = self._graph.run(["logits", *self._presents], feeds)
        return logits, dict(zip(self._nothing, present, strict=True))

    def _token(self, logits: NDArray[np.float32]) -> int:
        column = int(logits[0, -1].argmax())
        return int(self._head[column]) if self._head else column
