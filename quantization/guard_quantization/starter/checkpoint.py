"""A trained student as a checkpoint folder, which recipes for checkpoints begin with."""

from __future__ import annotations

from pathlib import Path

from guard_quantization.checkpoint.beliefs import TEMPLATE
from guard_quantization.checkpoint.tensors import Entry, fresh_folder, write_json, write_tensors
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.starter.pipeline import Pipeline
from guard_quantization.starter.teacher import CODES
from guard_service.artifact import TOKENIZER_FILE


def save_student(pipeline: Pipeline, folder: Path) -> None:
    """Train the pipeline's student if that is not done, and write it to the new folder `folder`.

    Hugging Face layout, float32, the output layer cut to the verdict's tokens; config.json names
    the template that it was trained with. Raises FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    llama = pipeline.student()[0].llama
    tokenizer = pipeline.tokenizer()
    head = verdict_tokens(tokenizer, CODES).head
    config = {**llama.shape.config(), "verdict_head": list(head)}
    state = llama.state_dict()
    entries = [Entry(name, tuple(tensor.shape), "F32") for name, tensor in state.items()]
    with fresh_folder(folder) as made:
        write_json(made / "config.json", {**config, TEMPLATE: pipeline.recipe.student.template})
        (made / TOKENIZER_FILE).write_text(tokenizer.to_str(), "utf-8")
        write_tensors(made, entries, lambda name: state[name].float())
