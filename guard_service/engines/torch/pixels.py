"""From a picture to the tiles that Mllama is shown, by transformers' own image processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image as PillowImage

from guard_service.artifact import ArtifactError
from guard_service.conversation import Picture
from guard_service.engines.torch.geometry import Geometry

# Mean and deviation of CLIP's training images (Radford et al., 2021), as the published
# preprocessor_config.json has them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_BILINEAR = 2  # of Pillow
_FLAGS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad")


@dataclass(frozen=True, slots=True)
class Tiles:
    """A picture fitted to a canvas of tiles; T tiles of SxS pixels, of which the first are used."""

    pixels: Any  # float32 [1, 1, T, 3, S, S]
    aspect_ids: Any  # int64 [1, 1]: the canvas
    mask: Any  # int64 [1, 1, T]: 1 for tiles that are used
    count: int  # of them

    def inputs(self) -> dict[str, Any]:
        """The arguments of Mllama's forward."""
        return {
            "pixel_values": self.pixels,
            "aspect_ratio_ids": self.aspect_ids,
            "aspect_ratio_mask": self.mask,
        }


def check_preprocessor(geometry: Geometry, stated: Mapping[str, Any]) -> None:
    """Raises ArtifactError when preprocessor_config.json wants other pixels than are made here."""
    wanted = _arguments(geometry) | dict.fromkeys(_FLAGS, True)
    for name, value in wanted.items():
        if not _alike(stated.get(name, value), value):
            raise ArtifactError(
                f"preprocessor_config.json: {name} is {ascii(stated[name])[:60]}, must be {value}"
            )


class Tiler:
    """Cuts pictures into tiles. For one thread at a time."""

    def __init__(self, geometry: Geometry) -> None:
        self._processor = _processor()(**_arguments(geometry))

    def tiles(self, picture: Picture) -> Tiles:
        """The tiles of an RGB picture [height, width, 3], uint8."""
        image = PillowImage.fromarray(picture.pixels)
        made = self._processor(images=[image], return_tensors="pt")
        mask = made["aspect_ratio_mask"]
        return Tiles(made["pixel_values"], made["aspect_ratio_ids"], mask, int(mask.sum()))


def _processor() -> Any:
    """The processor that resizes with Pillow, as transformers 5 calls it or as 4 does."""
    try:
        from transformers import MllamaImageProcessorPil as Processor
    except ImportError:
        from transformers import MllamaImageProcessor as Processor
    return Processor


def _arguments(geometry: Geometry) -> dict[str, Any]:
    vision = geometry.vision or {}
    return {
        "size": {"height": vision["image_size"], "width": vision["image_size"]},
        "max_image_tiles": vision["max_num_tiles"],
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": _BILINEAR,
        "rescale_factor": 1 / 255,
    }


def _alike(stated: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return (
            isinstance(stated, list)
            and len(stated) == len(wanted)
            and all(map(_alike, stated, wanted))
        )
    if isinstance(wanted, float):
        return isinstance(stated, int | float) and abs(stated - wanted) < 1e-6
    return bool(stated == wanted)
