"""How a checkpoint's prompts are made, and its verdicts read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tokenizers import Tokenizer

from guard_service.artifact import ArtifactError
from guard_service.engines import ModelCard
from guard_service.engines.scoring import verdict_tokens
from guard_service.engines.torch.folder import Folder
from guard_service.manifest import Verdict
from guard_service.prompt import PromptBuilder
from guard_service.templates import BY_NAME, Template
from guard_service.tokenizer import load_tokenizer

_WINDOW_TOKENS = 2048  # of a conversation: as many as one run takes
_CODES = tuple(f"S{number}" for number in range(1, 100))  # that a list may number


@dataclass(frozen=True, slots=True)
class Reading:
    """What belongs to a checkpoint's tokenizer and template."""

    tokenizer: Tokenizer
    builder: PromptBuilder
    template: Template
    verdict: Verdict

    @classmethod
    def of(cls, folder: Folder) -> Self:
        """Raises ArtifactError for a tokenizer that is not the model's, or not a Llama Guard's."""
        template, text = BY_NAME[folder.geometry.template], folder.geometry.text
        try:
            tokenizer = load_tokenizer(folder.tokenizer)
            codes = _CODES if template.takes_categories else tuple(template.wording)
            verdict = verdict_tokens(tokenizer, codes)
            window = min(_WINDOW_TOKENS, text["max_position_embeddings"] // 2)
            builder = PromptBuilder(tokenizer, template.name, window)
        except ValueError as error:
            raise ArtifactError(f"{folder.tokenizer}: {error}") from error
        # The image's token, where the tokenizer has one, is the last; the output has no row for it.
        rows = text["vocab_size"] + (folder.geometry.vision is not None)
        if tokenizer.get_vocab_size(with_added_tokens=True) > rows:
            raise ArtifactError(f"{folder.tokenizer}: has more tokens than the model")
        return cls(tokenizer, builder, template, verdict)

    def card(self, folder: Folder, parameters: int, plan: str) -> ModelCard:
        """What the model is. `plan` is how its weights are held."""
        template = self.template
        return ModelCard(
            name=folder.path.name,
            digest=folder.digest,
            engine="torch",
            plan=plan,
            template=template.name,
            categories=tuple(template.wording),
            custom_categories=template.takes_categories,
            custom_codes=tuple(self.verdict.codes) if template.takes_categories else (),
            judges_images=folder.geometry.vision is not None,
            window_tokens=self.builder.window_tokens,
            parameters=parameters,
            notice=folder.geometry.notice,
        )
