"""The Engine protocol: what a loaded model must offer to the service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from guard_policies.assessment import Assessment
from guard_service.artifact import MANIFEST_FILE, load_named
from guard_service.engines.plans import STORED
from guard_service.prompt import Prompt, PromptBuilder

FAKE = "fake"
FAKE_VISION = "fake-vision"
SESSION_BYTES = 512 * 2**20  # at the size of a 1B guard, 10,000 tokens
IMAGE_CACHE_BYTES = 2**30  # at the size of the 11B guard, five images of four tiles


class EngineFailed(RuntimeError):
    """The model could not judge. The text holds no content of a prompt."""


class EngineOverloaded(EngineFailed):
    """There is no memory for this now; the same may be answered later, or in a smaller batch."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a loaded model is, for GetInfo, metrics and verdicts."""

    name: str
    digest: str  # "sha256:..."
    engine: str  # "onnx", "fake", ...
    template: str
    categories: tuple[str, ...]  # codes that the model knows
    custom_categories: bool  # whether a policy may bring categories and wording of its own
    judges_images: bool
    window_tokens: int  # conversation tokens that one window holds
    parameters: int
    plan: str = ""  # of kernels, where an engine has several
    notice: str = ""  # shown with the model, for example that it is a starter
    custom_codes: tuple[str, ...] = ()  # codes that categories of a policy's own may have


@dataclass(frozen=True, slots=True)
class Assessed:
    """One prompt's assessment and what it cost."""

    assessment: Assessment
    computed_tokens: int
    cached_tokens: int


class Session(Protocol):
    """What an engine holds of one growing conversation, so that it computes only what is new.

    What is held may be dropped at any time to make room; it is then computed anew.
    """

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """What the engine's `assess` gives, up to float noise; runs where that one runs."""
        ...

    def held(self, prompt: Prompt) -> int:
        """How many tokens of the prompt's body need not be computed, as things stand; any thread.

        Engines look for them from the body's start, so the prompt may have changed anywhere.
        """
        ...

    def close(self) -> None:
        """Hold nothing from now on; any thread, even while `assess` runs."""
        ...


class Engine(Protocol):
    """A loaded model. `assess` runs in worker threads, at most `lanes` of them at once."""

    card: ModelCard
    lanes: int = 1

    def prompt_builder(self) -> PromptBuilder:
        """The builder of this model's prompts (its tokenizer and template); thread-safe."""
        ...

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """One result per prompt, in order. Raises EngineFailed for the whole batch."""
        ...

    def session(self) -> Session | None:
        """For a conversation that grows; None when the engine judges each step of it whole."""
        return None

    @property
    def session_bytes(self) -> int:
        """Memory that the states of sessions take now."""
        return 0

    @property
    def sessions_crowded_out(self) -> int:
        """How often a session's state was dropped for want of room, and had to be made anew."""
        return 0

    def self_test(self) -> None:
        """Score the artifact's golden prompts; raises EngineFailed when they differ."""
        ...

    def close(self) -> None:
        """Free the model's memory; the engine is not used afterwards."""
        ...


def open_engine(
    model: str | Path,
    threads: int = 1,
    prefix_cache: bool = True,
    session_bytes: int = SESSION_BYTES,
    *,
    plan: str = STORED,
    lanes: int = 1,
    prepared: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "stored",
    image_cache_bytes: int = IMAGE_CACHE_BYTES,
) -> Engine:
    """Load a model: "starter" (in this package), "fake" or "fake-vision" (for tests), an artifact
    folder, or the folder of a Llama Guard 3 checkpoint in the Hugging Face layout.

    `session_bytes` bounds what is kept of growing conversations, all of them together. `device` is
    `cpu`, `cuda`, or `auto`: CUDA where there is one. Each of `lanes` has `threads` threads of its
    own; a checkpoint has one lane, with all of them.

    Of an artifact, `plan` is a kernel plan of `engines.plans`; `auto` takes the fastest here,
    measured unless the folder `prepared` remembers it. Of a checkpoint, `dtype` is `bfloat16`,
    `float32` or `auto`, `weights` is `stored`, `int8` or `int4`, and `image_cache_bytes` bounds
    what is kept of images.

    Raises ArtifactError for a folder that cannot be served, EngineFailed for a model that cannot be
    loaded. Ready to serve only once `self_test` has passed.
    """
    if model in (FAKE, FAKE_VISION):
        from guard_service.engines.fake import FakeEngine

        return FakeEngine(sees_images=model == FAKE_VISION)
    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / MANIFEST_FILE).exists():
        open_checkpoint = _checkpoints()
        return open_checkpoint(
            folder,
            threads * lanes,
            prefix_cache,
            session_bytes,
            image_cache_bytes,
            device=device,
            dtype=dtype,
            weights=weights,
        )
    from guard_service.engines.choosing import open_artifact  # heavy, needed by this choice only

    return open_artifact(
        load_named(model), threads, prefix_cache, session_bytes, plan, lanes, prepared, device
    )


def _checkpoints() -> Callable[..., Engine]:
    """What opens checkpoints, where torch is installed."""
    try:
        from guard_service.engines.torch.engine import open_checkpoint
    except ModuleNotFoundError as error:
        raise EngineFailed(
            f"a checkpoint needs {error.name}: pip install 'llama-guard-service[vision]', or make "
            "an artifact of it with guard-quantize export"
        ) from error
    return open_checkpoint
