"""A tiny random Llama as a GGUF file, which writes letters: built, never committed."""

from __future__ import annotations

from pathlib import Path

import torch

from guard_quantization.export.gguf import write_gguf
from tests.quantization.tiny_llama import saved, tiny_llama

# What llama.cpp is loaded with: its chats end as Llama 3's do, and take one thread.
LOADED = {"chat_format": "llama-3", "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}


def tiny_gguf(folder: Path) -> Path:
    """The file, in a folder that is there; asked greedily, it says the same every time."""
    model = tiny_llama()
    letters = torch.zeros(model.lm_head.weight.shape[0], 1)
    letters[ord("a") : ord("z") + 1] = 1.0  # tokens below 256 are bytes
    model.lm_head.weight.mul_(letters)
    file = folder / "tiny.gguf"
    write_gguf(saved(model, folder / "checkpoint"), file, "f16")
    return file
