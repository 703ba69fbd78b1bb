"""Models for tests of their exchange: made of a file's text, each with a score of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from guard_policies.assessment import Assessment
from guard_service.engines import Assessed, Engine, EngineFailed
from guard_service.engines.fake import CODES, FakeEngine
from guard_service.prompt import Prompt
from tests.service.asking import PATIENCE_S


class Model(FakeEngine):
    """Made of a file's text; knows whether it was closed."""

    def __init__(self, text: str) -> None:
        super().__init__(
            categories=("S1", "S2") if "narrow" in text else FakeEngine().card.categories
        )
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.card = replace(self.card, digest=f"sha256:{digest}", name=text.split()[0])
        self.gate = threading.Event()
        self.gate.set()
        self.before_run = lambda texts: (self.gate.wait(PATIENCE_S), None)[1]
        self.closed = False
        self._strange = "strange" in text

    @property
    def score(self) -> float:
        """Of everything that it judges, for S1; below 0.9."""
        return int(self.card.digest[-4:], 16) / 65536 * 0.9

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        found = Assessment(self.score, {**dict.fromkeys(CODES, 0.0), "S1": self.score})
        return [replace(one, assessment=found) for one in super().assess(prompts)]

    def self_test(self) -> None:
        if self._strange:
            raise EngineFailed("golden prompt 1 scores 0.5, not 0.9")

    def close(self) -> None:
        self.closed = True


@dataclass
class Store:
    """Folders of models, and what was opened of them. `link` is what a server is told."""

    folder: Path
    opened: list[Model] = field(default_factory=list)
    opening: Callable[[], None] = lambda: None

    def path(self, link: str = "first") -> str:
        return str(self.folder / link)

    def has(self, text: str, link: str = "first") -> None:
        """The link leads to a new folder, as an operator's `ln -sfn` has it."""
        made = self.folder / f"{link}-{len(list(self.folder.iterdir()))}"
        made.mkdir()
        (made / "guard.json").write_text(text)
        draft = self.folder / "draft"
        draft.symlink_to(made.name)
        draft.rename(self.folder / link)

    def open(self, model: str, plan: str) -> Engine:
        self.opening()
        text = (Path(model) / "guard.json").read_text()
        if "broken" in text:
            raise EngineFailed("cannot be loaded")
        self.opened.append(Model(text))
        return self.opened[-1]
