"""The same model by transformers alone: what our engine is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guard_service.engines.torch.engine import Checkpoint
from guard_service.engines.torch.pixels import Tiler
from guard_service.prompt import IMAGE_TOKEN_ID, Prompt


class Plain:
    """`generate` on a checkpoint's own model, with nothing kept from one prompt to the next."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model
        self._image_token = checkpoint.geometry.image_token
        sees = checkpoint.geometry.vision is not None
        self._tiler = Tiler(checkpoint.geometry) if sees else None

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """The arguments of `forward` and `generate` for a whole prompt, its image cut to tiles."""
        tokens = (*prompt.prefix, *prompt.body, *prompt.closing)
        ids = [self._image_token if token == IMAGE_TOKEN_ID else token for token in tokens]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if prompt.image is not None:
            assert prompt.image.picture is not None and self._tiler is not None
            tiles = self._tiler.tiles(prompt.image.picture)
            sees = torch.zeros((1, len(ids), 1, tiles.mask.shape[-1]), dtype=torch.int64)
            sees[:, tokens.index(IMAGE_TOKEN_ID) :, :, : tiles.count] = 1
            inputs |= {**tiles.inputs(), "cross_attention_mask": sees}
        return {name: value.to(self._model.device) for name, value in inputs.items()}

    def written(self, prompt: Prompt, tokens: int) -> tuple[int, ...]:
        """Exactly so many tokens, greedily, whichever they are: the length of a verdict decides
        how long it takes, not its words."""
        inputs = self.inputs(prompt)
        with torch.inference_mode():
            made = self._model.generate(
                **inputs,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                pad_token_id=0,
            )
        return tuple(made[0, inputs["input_ids"].shape[1] :].tolist())
