"""What transformers itself computes and writes for the same prompts, loaded by its own means."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as PillowImage
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from guard_policies.assessment import Assessment
from guard_service.engines.scoring import verdict_tokens
from guard_service.prompt import IMAGE_TOKEN_ID, Prompt
from tests.service.torch.checkpoints import VISION, WORDS, tokenizer

TOKENS = verdict_tokens(tokenizer(image=False), [f"S{number}" for number in range(1, 20)])
SPOKEN = (TOKENS.unsafe, TOKENS.newline, TOKENS.mark)


@cache
def loaded(folder: Path) -> Any:
    """The model as `from_pretrained` loads it."""
    sees = (folder / "config.json").read_text().find("Mllama") >= 0
    kind = "MllamaForConditionalGeneration" if sees else "LlamaForCausalLM"
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def processed(picture: np.ndarray[Any, Any]) -> Any:
    """The inputs that transformers' processor makes of a picture."""
    size = VISION["image_size"]
    kind = getattr(transformers, "MllamaImageProcessorPil", transformers.MllamaImageProcessor)
    processor = kind(
        size={"height": size, "width": size},
        max_image_tiles=VISION["max_num_tiles"],
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return processor(images=[PillowImage.fromarray(picture)], return_tensors="pt")


def inputs_of(prompt: Prompt, spoken: tuple[int, ...] = SPOKEN) -> dict[str, Any]:
    """The arguments of a whole run, nothing cached."""
    tokens = (*prompt.prefix, *prompt.body, *prompt.closing, *spoken)
    ids = [WORDS if token == IMAGE_TOKEN_ID else token for token in tokens]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if prompt.image is None:
        return inputs
    assert prompt.image.picture is not None
    made = processed(prompt.image.picture.pixels)
    sparse = [get_cross_attention_token_mask(ids, WORDS)]
    dense = convert_sparse_cross_attention_mask_to_dense(
        sparse, made["num_tiles"], max_num_tiles=VISION["max_num_tiles"], length=len(ids)
    )
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    inputs |= {name: made[name] for name in names}
    inputs["cross_attention_mask"] = torch.from_numpy(dense)
    return inputs


@torch.inference_mode()
def expected(model: Any, prompt: Prompt) -> Assessment:
    """The scores, worked out from transformers' logits."""
    logits = model(**inputs_of(prompt)).logits[0].double()
    before, behind = logits[-1 - len(SPOKEN)], logits[-1]
    unsafe = float(torch.sigmoid(before[TOKENS.unsafe] - before[TOKENS.safe]))
    codes = torch.tensor([TOKENS.codes[code] for code in prompt.categories])
    shares = (behind[codes].softmax(0) * unsafe).tolist()
    return Assessment(unsafe, dict(zip(prompt.categories, shares, strict=True)))


@torch.inference_mode()
def written(model: Any, prompt: Prompt, most: int) -> str:
    """What `generate` writes, greedily, at most so many tokens."""
    inputs = inputs_of(prompt, spoken=())
    words = tokenizer(image=False)
    ends = [words.token_to_id(f"<|{name}|>") for name in ("eot_id", "eom_id", "end_of_text")]
    made = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    tokens = [int(token) for token in made[0, inputs["input_ids"].shape[1] :]]
    return str(words.decode([token for token in tokens if token not in ends]))
