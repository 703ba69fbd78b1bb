"""Pictures become the tiles that the published model expects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard_service.conversation import Picture
from guard_service.engines.torch.geometry import Geometry
from guard_service.engines.torch.pixels import MEAN, STD, Tiler
from tests.service.torch.checkpoints import VISION

VECTORS = Path(__file__).parents[4] / "shared/reference/vectors/image_tiling_vectors.json"


def tiler(size: int) -> Tiler:
    vision = {**VISION, "image_size": size}
    return Tiler(Geometry("", {}, vision, 0, "llama-guard-3-11b-vision", ""))


def of_colour(width: int, height: int, colour: tuple[int, ...] = (10, 200, 90)) -> Picture:
    return Picture("", np.full((height, width, 3), colour, np.uint8))


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    if not VECTORS.exists():
        pytest.skip("the reference data is not here")
    found: dict[str, Any] = json.loads(VECTORS.read_text())
    return found


def test_canvas_tiles_and_ids_are_the_references(vectors: dict[str, Any]) -> None:
    assert tuple(vectors["image_mean"]) == MEAN and tuple(vectors["image_std"]) == STD
    cut = tiler(vectors["tile_size"])
    assert vectors["cases"]
    for case in vectors["cases"]:
        made = cut.tiles(of_colour(case["image_width"], case["image_height"]))
        name = f"{case['image_width']}x{case['image_height']}"
        assert list(made.pixels.shape) == case["pixel_values_shape"], name
        assert made.aspect_ids.tolist() == [[case["aspect_ratio_id"]]], name
        assert made.mask.tolist() == [[case["aspect_ratio_mask"]]], name
        assert made.count == case["num_tiles"], name
        _check_canvas(made.pixels, case)


def _check_canvas(pixels: Any, case: dict[str, Any]) -> None:
    """The picture fills its share of the canvas, and the rest is black."""
    size = pixels.shape[-1]
    wide, tall = case["canvas_width"] // size, case["canvas_height"] // size
    tiles = pixels[0, 0, : wide * tall].reshape(tall, wide, 3, size, size)
    canvas = tiles.permute(2, 0, 3, 1, 4).reshape(3, tall * size, wide * size)
    values = torch.tensor([10, 200, 90]) / 255
    colour = (values - torch.tensor(MEAN)) / torch.tensor(STD)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    wanted = black[:, None, None].repeat(1, tall * size, wide * size)
    wanted[:, : case["resized_height"], : case["resized_width"]] = colour[:, None, None]
    torch.testing.assert_close(canvas, wanted, atol=1e-5, rtol=0)


def test_tiles_are_cut_row_by_row_from_the_picture_itself() -> None:
    """A picture of exactly the canvas is not resized, so every pixel can be told."""
    pixels = np.random.default_rng(3).integers(0, 256, (56, 56, 3), np.uint8)
    made = tiler(28).tiles(Picture("", pixels))
    assert made.count == 4
    values = torch.from_numpy(pixels.astype(np.float32)) / 255
    whole = ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    for at, (top, left) in enumerate(((0, 0), (0, 28), (28, 0), (28, 28))):
        wanted = whole[:, top : top + 28, left : left + 28]
        torch.testing.assert_close(made.pixels[0, 0, at], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3000, 1), (1, 3000), (3, 2)])
def test_pictures_of_any_shape_have_tiles(width: int, height: int) -> None:
    made = tiler(28).tiles(of_colour(width, height))
    assert 1 <= made.count <= 4 and bool(torch.isfinite(made.pixels).all())
