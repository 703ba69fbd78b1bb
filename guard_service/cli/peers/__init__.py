"""Who takes part in `guardctl bench engine`: our engine and others, on the same tokens.

Each runs in a process of its own (`worker`), so that its memory is its own and its crash ends
nobody else. A peer's libraries are imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

KINDS = (
    *("gguf", "transformers", "transformers-fp32", "transformers-bf16", "onnx"),
    *("torch", "torch-fp32", "torch-bf16"),
)
BOTH = ("transformers", "torch")  # that stand for both number types


class PeerUnavailable(RuntimeError):
    """The peer cannot take part here. The text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt in three pieces of tokens; a verdict is read behind the last."""

    prefix: tuple[int, ...]
    body: tuple[int, ...]
    closing: tuple[int, ...]
    categories: tuple[str, ...]
    of_response: bool = False

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [*self.prefix, *self.body, *self.closing]

    def document(self) -> dict[str, Any]:
        """As JSON takes it; see `of`."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Question:
        """The question whose `document` this is."""
        pieces = {name: tuple(value) for name, value in document.items() if name != "of_response"}
        return cls(**pieces, of_response=document["of_response"])


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verdict cost in tokens, and which tokens a peer wrote for it."""

    computed: int
    written: tuple[int, ...] = ()


class Peer(Protocol):
    """A loaded model that judges."""

    def verdict(self, question: Question, decode: int) -> Answer:
        """Judge.

        What only generates writes `decode` tokens, greedily and whatever they are: the timing of a
        model with random weights is that of one whose verdict has as many tokens. It keeps the
        state behind the last question's prefix, if it can, and takes it up when the next question
        has the same.
        """
        ...


def needed(module: str, extra: str) -> Any:
    """Import a library that only a peer needs. Raises PeerUnavailable when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PeerUnavailable(
            f"{module} is not installed: pip install 'llama-guard-service[{extra}]'"
        ) from None


def open_peer(kind: str, path: Path, threads: int) -> Peer:
    """Load "ours" or one of KINDS. Raises PeerUnavailable; the library's own errors pass."""
    if kind == "ours":
        from guard_service.cli.peers.ours import Ours

        return Ours(path, threads)
    if not path.exists():
        raise PeerUnavailable(f"{path}: no such file or folder")
    if kind == "gguf":
        from guard_service.cli.peers.gguf import Gguf

        return Gguf(path, threads)
    if kind.startswith("torch-"):
        from guard_service.cli.peers.ours import Ours

        return Ours(path, threads, "bfloat16" if kind == "torch-bf16" else "float32")
    if kind == "onnx":
        from guard_service.cli.peers.onnx import PlainOnnx

        return PlainOnnx(path, threads)
    from guard_service.cli.peers.transformers import Transformers

    return Transformers(path, threads, half=kind == "transformers-bf16")
