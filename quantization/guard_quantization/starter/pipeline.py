"""The starter's pipeline: tokenizer, teacher, views, student, evaluation, artifact; stage by stage.

Every stage writes into the run folder and stamps what it was made from. A stage whose stamp fits is
skipped; training goes on from its last checkpoint; another recipe's result is never written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from guard_quantization.data import Row, contrast_rows, read_folder, sample_epoch
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.llama import GuardLlama
from guard_quantization.recipe import Epoch, Recipe, shares
from guard_quantization.starter.exchange import exchanged_rows
from guard_quantization.starter.student import HEAD_ROWS, Classroom, Student, distill
from guard_quantization.starter.teacher import CODES, Judge, train_teacher
from guard_quantization.starter.vocabulary import token_vectors, train_tokenizer
from guard_quantization.starter.wordnet import read_nouns
from guard_service.prompt import PromptBuilder
from guard_service.tokenizer import load_tokenizer

WORDNET = Path("/usr/share/wordnet")  # of the Debian package wordnet-base


class StaleStage(ValueError):
    """The run folder holds a stage's result that was made from something else."""


class Pipeline:
    """One recipe in one run folder.

    `encoder` is the folder of the sentence encoder (BERT), `wordnet` that of WordNet's database;
    they are read only by the stages that need them.
    """

    def __init__(
        self, recipe: Recipe, data: Path, runs: Path, encoder: Path, wordnet: Path = WORDNET
    ) -> None:
        self.recipe, self.data, self.encoder, self.wordnet = recipe, data, encoder, wordnet
        self.folder = runs / recipe.name
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def rows(self) -> list[Row]:
        """All labelled rows: the data folder and the contrast families of this package."""
        return [*read_folder(self.data), *contrast_rows()]

    @cached_property
    def train_rows(self) -> list[Row]:
        """What may be trained on."""
        held = set(self.recipe.held_out)
        return [row for row in self.rows if row.split == "train" and row.source not in held]

    @cached_property
    def exchanged_rows(self) -> list[Row]:
        """Conversations that only the teacher judges; none when the recipe asks for none."""
        count = self.recipe.student.exchanged
        if not count:
            return []
        return exchanged_rows(self.train_rows, read_nouns(self.wordnet), count, self.recipe.seed)

    def teacher_epochs(self) -> list[list[tuple[Row, float]]]:
        """What the teacher is trained on, epoch by epoch."""
        plan = self.recipe.teacher
        return self._epochs(plan.epochs, plan.languages, self.train_rows)

    def student_epochs(self) -> list[list[tuple[Row, float]]]:
        """What the student is trained on, epoch by epoch."""
        plan = self.recipe.student
        return self._epochs(plan.epochs, plan.languages, self.train_rows + self.exchanged_rows)

    def _epochs(
        self, mixes: Sequence[Epoch], languages: Sequence[str], rows: Sequence[Row]
    ) -> list[list[tuple[Row, float]]]:
        rows = [row for row in rows if not languages or row.language in languages]
        seed = self.recipe.seed
        return [sample_epoch(rows, shares(mix), seed + at) for at, mix in enumerate(mixes)]

    def tokenizer(self) -> Tokenizer:
        """Stage 1: the student's tokenizer."""
        path = self.folder / "tokenizer.json"

        def make() -> None:
            size = self.recipe.tokenizer.size
            trained = train_tokenizer(self._texts(), size, self.recipe.student.template)
            path.write_text(trained.to_str(), "utf-8")

        self._stage("tokenizer", ("tokenizer",), make)
        return load_tokenizer(path)

    def teacher(self) -> Judge:
        """Stage 2: the fine-tuned encoder."""
        plan = self.recipe.teacher
        judge = Judge(self.encoder, plan.most_tokens)
        checkpoint = self.folder / "teacher.pt"

        def make() -> None:
            torch.manual_seed(self.recipe.seed)
            train_teacher(judge, self.teacher_epochs(), checkpoint, plan.lr)

        files = {file for epoch in plan.epochs for file in epoch}
        self._stage("teacher", ("teacher",), make, lambda row: row.file in files)
        judge.model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        judge.model.eval()
        return judge

    def views(self) -> tuple[dict[str, int], Tensor, Tensor]:
        """Stage 3: what the teacher thinks of the student's rows: index by id, logits, outputs."""
        path = self.folder / "views.pt"

        def make() -> None:
            languages = set(self.recipe.teacher.languages)
            seen = {row.id: row for epoch in self.student_epochs() for row, _ in epoch}
            rows = [row for row in seen.values() if not languages or row.language in languages]
            logits, pooled = self.teacher().views(rows)
            ids = [row.id for row in rows]
            torch.save({"ids": ids, "logits": logits.half(), "pooled": pooled.half()}, path)

        self._stage("views", ("teacher", "student"), make)
        kept = torch.load(path, weights_only=True)
        index = {row: at for at, row in enumerate(kept["ids"])}
        return index, kept["logits"], kept["pooled"]

    def student(self) -> tuple[Student, Classroom]:
        """Stage 4: the distilled Llama."""
        plan = self.recipe.student
        tokenizer = self.tokenizer()
        checkpoint = self.folder / "student.pt"
        verdict = verdict_tokens(tokenizer, CODES)
        builder = PromptBuilder(tokenizer, plan.template, plan.window_tokens)
        spoken = (verdict.unsafe, verdict.newline, verdict.mark)

        def make() -> None:
            student = self.new_student(tokenizer)
            index, logits, pooled = self.views()
            classroom = Classroom(builder, spoken, index, plan.trust)
            epochs = self.student_epochs()
            torch.manual_seed(self.recipe.seed)
            distill(
                student,
                classroom,
                epochs,
                (logits, pooled),
                checkpoint,
                lr=plan.lr,
                embedding_lr=plan.embedding_lr,
                tokens=plan.tokens,
                quantized_from=plan.quantized_from,
            )

        self._stage("student", ("tokenizer", "teacher", "student"), make)
        state = torch.load(checkpoint, weights_only=True)["model"]
        llama = GuardLlama(plan.llama(tokenizer.get_vocab_size()), HEAD_ROWS, plan.dropout)
        student = Student(llama, len(state["project.weight"]))
        student.load_state_dict(state)
        student.eval()
        return student, Classroom(builder, spoken, {})

    def new_student(self, tokenizer: Tokenizer) -> Student:
        """A student at its beginning: embeddings from the encoder, a last layer that pools."""
        shape = self.recipe.student.llama(tokenizer.get_vocab_size())
        encoder_tokenizer = AutoTokenizer.from_pretrained(self.encoder, local_files_only=True)
        encoder = BertModel.from_pretrained(self.encoder, local_files_only=True).eval()
        torch.manual_seed(self.recipe.seed)
        llama = GuardLlama(shape, HEAD_ROWS, self.recipe.student.dropout)
        vectors = token_vectors(tokenizer, encoder, encoder_tokenizer)
        llama.model["embed_tokens"].weight.data.copy_(vectors)
        llama.pool_last()
        return Student(llama, encoder.config.hidden_size)

    def _texts(self) -> Iterator[str]:
        for row in self.train_rows:
            for _, text in row.turns:
                yield text[:1500]

    def _stage(
        self,
        name: str,
        sections: Sequence[str],
        make: Callable[[], None],
        concerns: Callable[[Row], bool] = lambda row: True,
    ) -> None:
        """Do a stage that depends on these sections of the recipe and the rows that concern it."""
        stamp = self.folder / f"{name}.stamp"
        data = self._digest(concerns)
        wanted = {"stage": name, "recipe": self.recipe.digest(*sections), "data": data}
        begun = self.folder / f"{name}.begun"
        for path in (stamp, begun):
            if path.exists() and json.loads(path.read_text()) != wanted:
                raise StaleStage(
                    f"{path} is of another recipe or other data; take another --runs folder, "
                    f"or delete the {name} files there"
                )
        if stamp.exists():
            return
        begun.write_text(json.dumps(wanted))
        make()
        begun.rename(stamp)

    @cached_property
    def data_digest(self) -> str:
        """Hash of which rows there are, how they are labelled and split."""
        return self._digest(lambda row: True)

    def _digest(self, concerns: Callable[[Row], bool]) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            if concerns(row):
                digest.update(f"{row.id} {row.unsafe} {row.split} {row.turns}\n".encode())
        return digest.hexdigest()
