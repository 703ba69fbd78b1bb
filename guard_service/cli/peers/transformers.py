"""transformers' `generate` on a checkpoint folder: greedy until the verdict is out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guard_service.cli.peers import Answer, Question, needed


class Transformers:
    """Keeps keys and values of the last prefix in the cache that it hands to `generate`."""

    def __init__(self, folder: Path, threads: int, half: bool) -> None:
        self._torch = needed("torch", "reference")
        self._library = needed("transformers", "reference")
        self._torch.set_num_threads(threads)
        kind = self._torch.bfloat16 if half else self._torch.float32
        self._model = self._load(folder, kind)
        self._prefix: tuple[int, ...] | None = None
        self._cache: Any = None

    def verdict(self, question: Question, decode: int) -> Answer:
        """See Peer."""
        if question.prefix != self._prefix:
            self._cache, self._prefix = self._library.DynamicCache(), question.prefix
        known = int(self._cache.get_seq_length())
        ids = self._torch.tensor([question.ids])
        with self._torch.inference_mode():
            whole = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                past_key_values=self._cache,
                max_new_tokens=decode,
                do_sample=False,
            )
        self._cache.crop(len(question.prefix))
        written = tuple(whole[0, len(question.ids) :].tolist())
        return Answer(len(question.ids) - known + decode - 1, written)

    def _load(self, folder: Path, kind: Any) -> Any:
        """The model. `generate` wants an output row for each token: where the head is cut to the
        tokens of verdicts (`verdict_head`), the others are rows of zeros.
        """
        head = json.loads((folder / "config.json").read_bytes()).get("verdict_head")
        model = self._library.LlamaForCausalLM.from_pretrained(
            folder,
            dtype=kind,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=head is not None,
        ).eval()
        if head is not None:
            rows = model.lm_head.weight.data
            rows.zero_()
            rows[head] = _head_rows(folder).to(kind)
        model.generation_config = self._library.GenerationConfig(pad_token_id=0)  # no end token
        return model


def _head_rows(folder: Path) -> Any:
    safetensors = needed("safetensors", "reference")
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118 (no mapping)
                return tensors.get_tensor("lm_head.weight")
    raise ValueError(f"{folder}: no safetensors file has lm_head.weight")
