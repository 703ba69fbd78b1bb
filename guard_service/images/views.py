"""How an image looks: its first frame as RGB, in every way in which a viewer may show it.

What is hidden from one viewer is plain to another. A transparent image is shown on white by some,
on black by others, and by those that drop transparency with the colours below it; a turned one is
turned back only by those that read EXIF. A model must see all of these.

Colour profiles are not applied, as models' own processors do not. CMYK becomes RGB by the plain
formula; 16 bits become 8 by dropping the lower ones.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

from PIL import BmpImagePlugin as _bmp
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL import GifImagePlugin as _gif
from PIL import JpegImagePlugin as _jpeg
from PIL import MpoImagePlugin as _mpo  # of JPEG
from PIL import PngImagePlugin as _png
from PIL import TiffImagePlugin as _tiff  # of EXIF; no TIFF is opened
from PIL import WebPImagePlugin as _webp

from guard_service.images.probe import Probed
from guard_service.images.reasons import Reason, Refused

# Loaded here, because a process that is about to decode can load nothing more.
Image.preinit()
PLUGINS = (_bmp, _gif, _jpeg, _mpo, _png, _tiff, _webp)
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK")
CLEAR_MODES = ("LA", "PA", "RGBA")

View = tuple[int, int, bytes]  # width, height, RGB rows


def views(data: bytes, probed: Probed) -> list[View]:
    """Each view, no two alike, the usual one first.

    Raises Refused for what Pillow cannot read, or what it reads otherwise than `probe` did.
    """
    Image.MAX_IMAGE_PIXELS = probed.width * probed.height
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of what is not as it should be
            with Image.open(io.BytesIO(data), formats=[probed.format]) as image:
                if image.size != (probed.width, probed.height):
                    raise Refused(Reason.MALFORMED)
                found: list[View] = []
                for view in _views(image):
                    shown = (*view.size, view.tobytes())
                    if shown not in found:
                        found.append(shown)
                return found
    except MemoryError:
        raise Refused(Reason.TOO_COSTLY) from None
    except Refused:
        raise
    except Exception:  # of the many kinds that Pillow raises for a broken file
        raise Refused(Reason.MALFORMED) from None


def _views(image: Image.Image) -> Iterator[Image.Image]:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        yield from _on_grounds(ImageOps.exif_transpose(image))
    yield from _on_grounds(image)


def _on_grounds(image: Image.Image) -> Iterator[Image.Image]:
    if not image.has_transparency_data:
        yield _opaque(image)
        return
    if image.mode not in (*PLAIN_MODES, *CLEAR_MODES):
        raise Refused(Reason.UNSUPPORTED)
    clear = image.convert("RGBA")
    for ground in ("white", "black"):
        opaque = Image.new("RGBA", clear.size, ground)
        yield Image.alpha_composite(opaque, clear).convert("RGB")
    yield clear.convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        upper = image.tobytes()[1::2]
        image = Image.frombytes("L", image.size, upper)
    if image.mode not in PLAIN_MODES:
        raise Refused(Reason.UNSUPPORTED)
    return image.convert("RGB")
