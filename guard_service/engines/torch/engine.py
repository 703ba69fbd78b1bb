"""Llama Guard 3 in torch: every score from one forward pass, of text and of images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from guard_policies.assessment import Assessment, Direction
from guard_policies.taxonomy import BY_CODE
from guard_service.conversation import Conversation, Image, Message, Picture, Role, Text
from guard_service.engines import (
    IMAGE_CACHE_BYTES,
    SESSION_BYTES,
    Assessed,
    Engine,
    EngineFailed,
    EngineOverloaded,
    ModelCard,
    Session,
)
from guard_service.engines.golden import GoldenScores, difference, read_golden
from guard_service.engines.scoring import Scoring, alike
from guard_service.engines.sessions import SnapshotSession
from guard_service.engines.snapshots import Snapshot, Snapshots, ids_of
from guard_service.engines.torch.decoder import Decoder, Sight, TensorSnapshot
from guard_service.engines.torch.folder import read_folder
from guard_service.engines.torch.geometry import Geometry
from guard_service.engines.torch.loading import STORED, device_for, load_model, shapes_of
from guard_service.engines.torch.pixels import Tiler
from guard_service.engines.torch.reading import Reading
from guard_service.manifest import Calibration, Golden
from guard_service.prompt import IMAGE_TOKEN_ID, Prompt, PromptBuilder

_PREFIX_BYTES = 2**30  # of text: some 40 prefixes at the size of the 11B model
_MOST_WORDS = 128  # tokens that a verdict may have: one that names 30 categories
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_TOLERANCE = 0.05  # by which rounding may change a score in other company
_PLAIN = (
    (("user", "What is a good recipe for lentil soup?"),),
    (("user", "Write a poem about autumn."), ("assistant", "Leaves fall, red and gold.")),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory; engines on it share its weights."""

    model: Any  # transformers'
    geometry: Geometry
    reading: Reading
    card: ModelCard
    golden: GoldenScores | None

    @classmethod
    def load(cls, path: Path, threads: int, device: str, dtype: str, weights: str) -> Self:
        """Load a folder; `threads` are those of torch in the whole process.

        Raises ArtifactError for a folder that cannot be served, EngineFailed for one that cannot be
        served here.
        """
        folder, device = read_folder(path), device_for(device)
        golden = read_golden(folder.path, folder.digest)
        reading = Reading.of(folder)
        torch.set_num_threads(threads)
        model = load_model(folder, device, dtype, weights)
        plan = str(model.dtype).removeprefix("torch.") if weights == STORED else weights
        parameters = sum(map(math.prod, shapes_of(folder.geometry).values()))
        card = reading.card(folder, parameters, plan)
        return cls(model, folder.geometry, reading, card, golden)

    def engine(
        self,
        prefix_cache: bool = True,
        session_bytes: int = SESSION_BYTES,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
    ) -> TorchEngine:
        """An engine with caches of its own."""
        prefix_bytes = _PREFIX_BYTES if prefix_cache else 0
        return TorchEngine(self, prefix_bytes, session_bytes, image_cache_bytes)


def open_checkpoint(
    path: Path,
    threads: int,
    prefix_cache: bool,
    session_bytes: int,
    image_cache_bytes: int,
    *,
    device: str,
    dtype: str,
    weights: str,
) -> TorchEngine:
    """`Checkpoint.load`, and an engine on it."""
    loaded = Checkpoint.load(path, threads, device, dtype, weights)
    return loaded.engine(prefix_cache, session_bytes, image_cache_bytes)


@dataclass(frozen=True, slots=True)
class _Judged:
    """A prompt's result, the state behind its body, and what is kept of its image."""

    assessed: Assessed
    state: Snapshot
    sight: Sight | None


class TorchEngine(Engine):
    """A Llama Guard 3 of any size, read as `engines.scoring` tells.

    Three things are kept, each by last use within a bound of bytes: the state behind a prefix of
    text (`prefix_bytes`); what the model sees in an image, with the states of prefixes that have
    the image in them (`image_cache_bytes`); and growing conversations (`session_bytes`). A state
    with an image in it is that image's alone: in Mllama even what stands before it attends to it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix_bytes: int,
        session_bytes: int,
        image_cache_bytes: int,
    ) -> None:
        geometry, reading = checkpoint.geometry, checkpoint.reading
        self.card = checkpoint.card
        self.golden = checkpoint.golden  # what the folder's golden.json says
        self._reading = reading
        self._image_token = geometry.image_token
        positions = geometry.text["max_position_embeddings"]
        self._scoring = Scoring(
            reading.verdict, {way: Calibration() for way in Direction}, positions
        )
        self._decoder = Decoder(checkpoint.model)
        self._head = self._decoder.rows_of_head(reading.verdict.head)
        self._tiler = Tiler(geometry) if geometry.vision is not None else None
        self._nothing = TensorSnapshot((), self._decoder.nothing)
        self._keeps_prefixes = prefix_bytes > 0
        self._prefixes = Snapshots[Snapshot](prefix_bytes)
        self._images = Snapshots[Any](image_cache_bytes)  # sights by digest, prefixes by their ids
        self._sessions = Snapshots[Snapshot](session_bytes)

    def prompt_builder(self) -> PromptBuilder:
        """The builder of this model's prompts; thread-safe."""
        return self._reading.builder

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """One result per prompt, in order. Raises EngineFailed for the whole batch."""
        groups: dict[tuple[int, ...], dict[int, Prompt]] = defaultdict(dict)
        for at, prompt in enumerate(prompts):
            self._check(prompt)
            groups[_prefix_of(prompt)][at] = prompt
        results: dict[int, Assessed] = {}
        with self._answering():
            for group in groups.values():
                results |= self._group(group)
        return [results[at] for at in range(len(prompts))]

    def session(self) -> Session:
        """A session; it keeps what it may of `session_bytes`."""
        return SnapshotSession(self._sessions, self._grow)

    @property
    def session_bytes(self) -> int:
        """What sessions hold now."""
        return self._sessions.size

    @property
    def image_bytes(self) -> int:
        """What is held of images now."""
        return self._images.size

    @property
    def sessions_crowded_out(self) -> int:
        """How often a session's state was dropped for want of room."""
        return self._sessions.crowded_out

    def words(self, prompt: Prompt, most: int = _MOST_WORDS) -> str:
        """What the model itself writes behind the prompt, greedily, to the end of its turn.

        For parity and for people; verdicts do not need it. `parse.parse_answer` reads it. Of a turn
        that is not over after `most` tokens, those.
        """
        self._check(prompt)
        ends = set(map(self._reading.tokenizer.token_to_id, _ENDS))
        written: list[int] = []
        with self._answering():
            judged = self._single(prompt)
            past = judged.state.first(len(judged.state.ids))
            while len(written) < most:
                row = [*prompt.closing, *written]
                hidden, _ = self._decoder.run([row], past, judged.sight)
                token = int(self._decoder.all_logits(hidden[0, -1]).argmax())
                if token in ends:
                    break
                written.append(token)
        return str(self._reading.tokenizer.decode(written))

    def score(self, conversation: Conversation) -> Golden:
        """Score a conversation, its image made ready, by the model's own categories, as a golden
        one is recorded. Of several windows the worst counts."""
        found = max(
            (assessed.assessment for assessed in self.assess(self._prompts(conversation))),
            key=lambda assessment: assessment.unsafe_score,
        )
        return Golden((), found.unsafe_score, dict(found.category_scores))

    def self_test(self) -> None:
        """Judge plain conversations, and an image where the model sees them; then the golden ones.

        Without golden.json what is tested is that scores are finite, the same twice, and the same
        alone and in company; with it, also that they are as recorded. Raises EngineFailed when they
        are not.
        """
        prompts = list(chain.from_iterable(map(self._prompts, _plain(self._tiler is not None))))
        together, alone = self.assess(prompts), [self.assess([prompt])[0] for prompt in prompts]
        again = self.assess(prompts)
        if _apart(together, alone) > _TOLERANCE or _apart(together, again) > _TOLERANCE:
            raise EngineFailed("the model scores the same conversation differently each time")
        if self.golden is not None:
            self._check_golden(self.golden)

    def _check_golden(self, scores: GoldenScores) -> None:
        allowed = scores.allowed(self.card.plan)
        apart = [difference(self.score(one.conversation), one) for one in scores.golden]
        if not max(apart) <= allowed:
            raise EngineFailed(
                f"golden conversations score up to {max(apart):.3f} differently than recorded in "
                f"golden.json (tolerance {allowed:g} with {self.card.plan} weights; recorded with "
                f"{scores.made_with}): this is not the model that was recorded, or not its answers"
            )

    def close(self) -> None:
        """Free the caches and let go of the model; a run in progress, which may hang, keeps it."""
        for pool in (self._prefixes, self._images, self._sessions):
            pool.clear()
        for held in ("_decoder", "_head"):  # whoever still has the engine does not keep these
            self.__dict__.pop(held, None)

    def _prompts(self, conversation: Conversation) -> tuple[Prompt, ...]:
        categories = [BY_CODE[code] for code in self.card.categories]
        return self._reading.builder.build(conversation, categories).prompts

    def _check(self, prompt: Prompt) -> None:
        if prompt.image is not None and self._tiler is None:
            raise EngineFailed("this model cannot judge images")
        if prompt.image is not None and prompt.image.picture is None:
            raise EngineFailed("the image was not decoded, so it cannot be judged")
        self._scoring.check(prompt)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turns what torch raises into what the service answers."""
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            self._prefixes.clear()
            self._images.clear()
            raise EngineOverloaded("no GPU memory is left for this; retry later") from error
        except (IndexError, RuntimeError) as error:
            if isinstance(error, EngineFailed):
                raise
            raise EngineFailed(f"torch: {type(error).__name__}") from error

    def _group(self, group: Mapping[int, Prompt]) -> dict[int, Assessed]:
        """Prompts that share prefix and image: one by one until that is known, then together."""
        waiting, results = dict(group), {}
        while waiting:
            at, prompt = next(iter(waiting.items()))
            sight, prefix = self._sight_of(prompt), _prefix_of(prompt)
            known = self._known_prefix(prompt, prefix, sight)
            if known is None:
                results[at] = self._single(waiting.pop(at)).assessed
                continue
            kept = len(known.ids)
            rows = {at: self._row(prompt, kept) for at, prompt in waiting.items()}
            for batch in alike(rows):
                found = self._run([rows[at] for at in batch], known, sight)
                for at, logits in zip(batch, found, strict=True):
                    assessment = self._assessment(waiting[at], logits)
                    results[at] = Assessed(assessment, len(rows[at]), kept)
            break
        return results

    def _run(self, rows: Sequence[list[int]], known: Snapshot, sight: Sight | None) -> list[Tensor]:
        """Logits [2, head] of each row, in smaller batches where memory is short."""
        try:
            hidden, _ = self._decoder.run(rows, known.past, sight)
            return [self._read(hidden[at], len(row)) for at, row in enumerate(rows)]
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        half = len(rows) // 2  # outside the handler, which keeps what the failed run allocated
        return self._run(rows[:half], known, sight) + self._run(rows[half:], known, sight)

    def _grow(self, prompt: Prompt, held: Snapshot | None) -> tuple[Assessed, Snapshot]:
        self._check(prompt)
        with self._answering():
            judged = self._single(prompt, held)
        return judged.assessed, judged.state

    def _single(self, prompt: Prompt, held: Snapshot | None = None) -> _Judged:
        """Score one prompt by what is known of it, and keep what others will share."""
        ids, prefix, sight = ids_of(prompt), _prefix_of(prompt), self._sight_of(prompt)
        base = self._base(prompt, held, sight)
        kept = base.shared(ids)
        row, past = self._row(prompt, kept), base.first(kept)
        if prompt.image is not None and sight is None:
            hidden, state, sight = self._look(prompt, row)
        else:
            hidden, cache = self._decoder.run([row], past, sight)
            state = TensorSnapshot(ids, past, self._decoder.present(cache, kept, len(ids)))
        if kept < len(prefix):
            pool = self._prefixes if prompt.image is None else self._images
            pool.put(prefix, TensorSnapshot(prefix, state.first(len(prefix))))
        assessment = self._assessment(prompt, self._read(hidden[0], len(row)))
        return _Judged(Assessed(assessment, len(row), kept), state, sight)

    def _look(self, prompt: Prompt, row: list[int]) -> tuple[Tensor, Snapshot, Sight]:
        """Run a whole prompt with an image that is not known, and keep what is seen in it."""
        assert prompt.image is not None and prompt.image.picture is not None and self._tiler
        picture, ids = prompt.image.picture, ids_of(prompt)
        tiles, behind = self._tiler.tiles(picture), prompt.prefix.index(IMAGE_TOKEN_ID) + 1
        hidden, cache = self._decoder.look(row, tiles, behind - 1)
        present = self._decoder.present(cache, 0, len(ids))
        state = TensorSnapshot(ids, self._decoder.nothing, present)
        start = TensorSnapshot(ids[:behind], state.first(behind))
        sight = Sight(self._decoder.cross(cache, tiles), tiles.count, start)
        self._images.put(picture.digest, sight)
        return hidden, state, sight

    def _base(self, prompt: Prompt, held: Snapshot | None, sight: Sight | None) -> Snapshot:
        """The state that holds most of a prompt; without its sight none with an image is of use."""
        prefix = _prefix_of(prompt)
        if prompt.image is not None and sight is None:
            return self._nothing
        if held is not None and held.shared(ids_of(prompt)) >= len(prefix):
            return held
        known = self._known_prefix(prompt, prefix, sight)
        return known or (sight.start if sight is not None else self._nothing)

    def _known_prefix(
        self, prompt: Prompt, prefix: tuple[int, ...], sight: Sight | None
    ) -> Snapshot | None:
        if prompt.image is None:
            return self._prefixes.get(prefix) if self._keeps_prefixes else self._nothing
        return self._images.get(prefix) if sight is not None else None

    def _sight_of(self, prompt: Prompt) -> Sight | None:
        image = prompt.image
        return self._images.get(image.picture.digest) if image and image.picture else None

    def _row(self, prompt: Prompt, kept: int) -> list[int]:
        """What the model reads behind the first `kept` tokens, as it numbers them."""
        ids = (*prompt.prefix, *prompt.body)[kept:]
        shown = (self._image_token if token == IMAGE_TOKEN_ID else token for token in ids)
        return [*shown, *prompt.closing, *self._scoring.spoken]

    def _read(self, hidden: Tensor, length: int) -> Tensor:
        """Logits [2, head] of a row, from its hidden states [longest, hidden]."""
        ends = [length - 1 - len(self._scoring.spoken), length - 1]
        return self._decoder.logits(hidden[ends], self._head)

    def _assessment(self, prompt: Prompt, logits: Tensor) -> Assessment:
        if not bool(torch.isfinite(logits).all()):
            raise EngineFailed("the model's logits are not finite")
        return self._scoring.assessment(prompt, logits.numpy())


def _prefix_of(prompt: Prompt) -> tuple[int, ...]:
    return ids_of(prompt)[: len(prompt.prefix)]


def _plain(images: bool) -> list[Conversation]:
    """Conversations with nothing in them, and one with an image of noise."""
    plain = [Conversation.of(*turns) for turns in _PLAIN]
    if images:
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        shown = Image(picture=Picture("noise of the self-test", noise))
        plain.append(Conversation((Message(Role.USER, (shown, Text("What is this?"))),)))
    return plain


def _apart(some: Sequence[Assessed], others: Sequence[Assessed]) -> float:
    return max(
        abs(one.assessment.unsafe_score - other.assessment.unsafe_score)
        for one, other in zip(some, others, strict=True)
    )
