"""What a verdict costs at a geometry, by arithmetic: multiply-adds and bytes. Nothing is run.

Counted are the products of matrices, attention's included; what is linear in the width (norms,
activations, positions) is left out. Names of sizes are those of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guard_service.engines.torch.geometry import Geometry

_PAD = 8  # transformers makes a tile's patches a multiple of this
EXTRA_ROWS = 8  # that Mllama's embedding has more than its output


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of the model does, beside its weights' bytes in the type they are held in."""

    multiply_adds: int = 0
    weights: int = 0  # parameters that are read
    state: int = 0  # numbers of keys and values that are read or written

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiply_adds + other.multiply_adds,
            self.weights + other.weights,
            self.state + other.state,
        )

    @property
    def flops(self) -> int:
        """A multiplication and an addition are two."""
        return 2 * self.multiply_adds


class Costs:
    """The arithmetic of one geometry."""

    def __init__(self, geometry: Geometry) -> None:
        text = geometry.text
        self.hidden: int = text["hidden_size"]
        self.mlp: int = text["intermediate_size"]
        self.vocab: int = text["vocab_size"]
        heads: int = text["num_attention_heads"]
        self._head_dim: int = text.get("head_dim") or self.hidden // heads
        self._queries: int = heads * self._head_dim
        self._keys: int = text["num_key_value_heads"] * self._head_dim
        self.cross_layers = len(text.get("cross_attention_layers", ()))
        self.text_layers: int = text["num_hidden_layers"] - self.cross_layers
        self._vision: Mapping[str, Any] | None = geometry.vision

    @property
    def parameters(self) -> int:
        """All of them."""
        norms = (self.text_layers + self.cross_layers) * 2 * self.hidden + self.hidden
        cross = self.cross_layers * (2 * self._head_dim + 2)  # norms of queries and keys; gates
        rows = 2 * self.vocab + (EXTRA_ROWS if self._vision is not None else 0)
        return self.text_weights + self.image_weights + norms + cross + rows * self.hidden

    @property
    def text_weights(self) -> int:
        """Parameters of the matrices that a token of text meets; embedding and output left out."""
        own = self.hidden * (2 * self._queries + 2 * self._keys + 3 * self.mlp)
        cross = self.hidden * (2 * self._queries + 3 * self.mlp)
        return self.text_layers * own + self.cross_layers * cross

    @property
    def state_per_token(self) -> int:
        """Numbers that are kept of a token of text."""
        return 2 * self.text_layers * self._keys

    @property
    def patches(self) -> int:
        """What text attends to of one tile: its patches, and one for the whole."""
        v = self._vision
        return int(v["image_size"] // v["patch_size"]) ** 2 + 1 if v is not None else 0

    def sight(self, tiles: int) -> int:
        """Numbers that are kept of an image of so many tiles."""
        return 2 * self.cross_layers * self._keys * self.patches * tiles

    @property
    def tower_weights(self) -> int:
        """Parameters of the vision model."""
        v = self._vision
        if v is None:
            return 0
        width, mlp, tiles = v["hidden_size"], v["intermediate_size"], v["max_num_tiles"]
        ratios = len(v["supported_aspect_ratios"]) + 1
        matrices = 4 * width * width + 2 * width * mlp
        vectors = mlp + width + 4 * width  # biases of the MLP, two norms
        layers, last = v["num_hidden_layers"], v["num_global_layers"]
        patch: int = width * v["num_channels"] * v["patch_size"] ** 2
        places = self.patches * width * (1 + ratios * tiles) + 2 * ratios * tiles * width
        gates: int = 1 + 2 + 2 * last  # of places within and among tiles, of the last layers
        total: int = (layers + last) * (matrices + vectors) + patch + places + 5 * width + gates
        return total

    @property
    def image_weights(self) -> int:
        """Parameters that only an image meets: the vision model, what fits it to text, and the
        layers' keys and values of images."""
        if self._vision is None:
            return 0
        fit: int = (self._vision["vision_output_dim"] + 1) * self.hidden
        return self.tower_weights + fit + self.cross_layers * 2 * self.hidden * self._keys

    def text(self, tokens: int, before: int = 0, tiles: int = 0) -> Work:
        """A row of text behind a known state of `before` tokens, which sees an image's tiles.

        The output layer is left out: verdicts read a few of its rows.
        """
        seen = tokens * before + tokens * (tokens + 1) // 2
        attention = 2 * self._queries * seen * self.text_layers
        crossed = 2 * self._queries * tokens * self.patches * tiles * self.cross_layers
        state = self.state_per_token * (before + 2 * tokens) + self.sight(tiles)
        products = self.text_weights * tokens
        if not tiles:  # then transformers skips the layers that look at images
            products -= self._skipped * tokens
        return Work(products + attention + crossed, self._met(tiles), state)

    def image(self) -> Work:
        """Looking at an image; all tiles are computed, whichever of them are used."""
        v = self._vision
        if v is None:
            return Work()
        tiles, width = v["max_num_tiles"], v["hidden_size"]
        layers = v["num_hidden_layers"] + v["num_global_layers"]
        padded = -(-self.patches // _PAD) * _PAD * tiles
        each = 4 * width * width + 2 * width * v["intermediate_size"]
        tower = layers * padded * (each + 2 * padded * width)
        tower += (self.patches - 1) * tiles * width * v["num_channels"] * v["patch_size"] ** 2
        seen = self.patches * tiles
        fit = seen * v["vision_output_dim"] * self.hidden
        keys = self.cross_layers * seen * 2 * self.hidden * self._keys
        return Work(tower + fit + keys, self.image_weights, self.sight(tiles))

    def written(self, before: int, tiles: int = 0) -> Work:
        """A token that is written: the whole output layer as well."""
        one, head = self.text(1, before, tiles), self.vocab * self.hidden
        return one + Work(head, head)

    @property
    def _skipped(self) -> int:
        return self.cross_layers * self.hidden * (2 * self._queries + 3 * self.mlp)

    def _met(self, tiles: int) -> int:
        return self.text_weights - (0 if tiles else self._skipped)
