"""The arithmetic of what a verdict costs, held against what torch counts when it is run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from guard_service.engines.torch.costs import Costs, Work
from guard_service.engines.torch.engine import Checkpoint
from guard_service.engines.torch.geometry import read_geometry
from guard_service.engines.torch.loading import shapes_of
from guard_service.engines.torch.plain import Plain
from guard_service.engines.torch.published import LLAMA_GUARD_3_11B_VISION, PUBLISHED
from tests.service.torch.prompts import picture, prompt

REFERENCE = Path(__file__).parents[4] / "shared/reference/model_configs.json"


def costs_of(config: Any) -> Costs:
    return Costs(read_geometry(json.dumps(config).encode()))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        yield counter


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_transformers_model(name: str) -> None:
    geometry = read_geometry(json.dumps(PUBLISHED[name]).encode())
    assert Costs(geometry).parameters == sum(map(math.prod, shapes_of(geometry).values()))


@pytest.mark.parametrize("seen", [False, True], ids=["text", "image"])
def test_multiply_adds_are_those_that_torch_counts(vision_folder: Path, seen: bool) -> None:
    loaded = Checkpoint.load(vision_folder, 1, "cpu", "float32", "stored")
    loaded.model.set_attn_implementation("eager")  # whose products torch counts, masked or not
    asked = prompt(loaded.engine(), "hello there", shown=picture(1) if seen else None)
    inputs = Plain(loaded).inputs(asked)
    with counting() as counter:
        loaded.model.model(**inputs)
    costs, length = Costs(loaded.geometry), inputs["input_ids"].shape[1]
    work = costs.text(length, 0, 4 if seen else 0) + (costs.image() if seen else Work())
    # Eager attention multiplies what stands behind a token too.
    masked = length * length - length * (length + 1) // 2
    text = loaded.geometry.text
    unseen = 2 * 2 * text["hidden_size"] * masked * costs.text_layers
    assert counter.get_total_flops() == pytest.approx(work.flops + unseen, rel=0.01)


def test_row_behind_a_known_state_costs_what_is_left_of_the_whole() -> None:
    costs = costs_of(LLAMA_GUARD_3_11B_VISION)
    for tiles in (0, 4):
        whole = costs.text(300, 0, tiles).multiply_adds
        first, rest = costs.text(200, 0, tiles), costs.text(100, 200, tiles)
        assert first.multiply_adds + rest.multiply_adds == whole
    written = costs.written(300)
    assert written.weights - costs.text(1, 300).weights == 128256 * 4096


def test_memory_of_the_vision_model_is_what_its_documents_say() -> None:
    costs = costs_of(LLAMA_GUARD_3_11B_VISION)
    assert costs.patches == 1601
    assert costs.sight(4) * 2 / 2**20 == pytest.approx(200.1, abs=0.1)  # MiB, bfloat16
    assert costs.state_per_token * 2 == 128 * 2**10
    assert costs_of(PUBLISHED["1b"]).image() == Work()


def test_work_adds_up() -> None:
    some = Work(1, 2, 3)
    assert some + replace(some, multiply_adds=5) == Work(6, 4, 6)
    assert (some + some).flops == 4


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference values are not at hand")
def test_published_geometries_are_the_references() -> None:
    reference = json.loads(REFERENCE.read_text())
    assert PUBLISHED["1b"] == reference["Llama-Guard-3-1B"]["config"]
    eight = reference["Llama-Guard-3-8B"]["config"]
    assert {name: PUBLISHED["8b"][name] for name in eight} == eight
    seeing, ours = reference["Llama-Guard-3-11B-Vision"]["config"], PUBLISHED["11b-vision"]
    assert ours["vision_config"] == seeing["vision_config"]
    text = seeing["text_config"]
    both = ours["text_config"].keys() & text.keys()
    assert {"hidden_size", "cross_attention_layers", "rope_scaling"} < both
    assert {n: ours["text_config"][n] for n in both} == {n: text[n] for n in both}
