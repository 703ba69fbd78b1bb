"""A checkpoint is taught by labels and by a teacher: a checkpoint, or an engine."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.checkpoint.asking import Asked, Draw, asked
from guard_quantization.checkpoint.beliefs import (
    Asker,
    CheckpointTeacher,
    EngineTeacher,
    believed,
    official_template,
)
from guard_quantization.checkpoint.comparison import read_states
from guard_quantization.checkpoint.distill import (
    DistillPlan,
    Example,
    distill_checkpoint,
    example,
    loss_of,
)
from guard_quantization.checkpoint.importance import batched
from guard_quantization.checkpoint.streaming import load_llama
from guard_quantization.checkpoint.tensors import read_config
from guard_quantization.data import Row
from guard_quantization.export.decoder import Precision
from guard_quantization.export.hf import LLAMA_GUARD_3_1B, export_checkpoint
from guard_service.artifact import load
from guard_service.engines.fake import FakeEngine
from guard_service.engines.onnx import OnnxEngine
from guard_service.prompt import PromptBuilder
from tests.quantization.tiny_llama import saved, tiny_llama

TEMPLATE = "compact-fixed"


def row(number: int) -> Row:
    unsafe = number % 2 == 0
    text = f"{'xx' * 20 if unsafe else 'oo' * 20} {number}"
    codes = ("S1",) if unsafe else ()
    return Row(f"r{number}", (("user", text),), unsafe, codes, "en", "toy", "toy", "train")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    model = tiny_llama(num_hidden_layers=2, initializer_range=0.05, max_position_embeddings=4096)
    return saved(model, folder)


def whole_list(made: Row) -> Asked:
    return asked(made, 1.0, LLAMA_GUARD_3[:13], Draw(), random.Random(0))


def test_a_checkpoint_learns_from_labels_and_keeps_its_layout(source: Path, tmp_path: Path) -> None:
    plan = DistillPlan(
        template=TEMPLATE, trust=0.0, shuffle=0.0, drop=0.0, lr=3e-3, warmup=5, tokens=1500,
        bfloat16=False, held_back=16, quantized_from=0.7, checkpointing=True,
    )  # fmt: skip
    epochs = [[(row(n), 1.0) for n in range(40)]] * 6
    held = [row(n) for n in range(100, 116)]
    out = tmp_path / "taught"
    figures = distill_checkpoint(source, out, plan, epochs, held, None, tmp_path / "work")
    assert figures["after"]["accuracy"] == 1.0 and figures["before"]["accuracy"] < 1.0
    assert figures["curve"][-1][1] < figures["curve"][0][1]
    config = json.loads((out / "config.json").read_text())
    asker = Asker.of(out, TEMPLATE, 512)
    assert tuple(config["verdict_head"]) == asker.head
    assert load_llama(out).lm_head.weight.shape[0] == len(asker.head)
    with pytest.raises(FileExistsError, match="never written over"):
        distill_checkpoint(source, out, plan, epochs, held, None, tmp_path / "work")


def test_a_student_comes_nearer_to_its_teacher(source: Path, tmp_path: Path) -> None:
    teacher = saved(tiny_llama(num_hidden_layers=3, initializer_range=0.12), tmp_path / "teacher")
    plan = DistillPlan(
        template=TEMPLATE, trust=1.0, shuffle=0.0, drop=0.0, lr=3e-3, warmup=5, tokens=1500,
        bfloat16=False, held_back=12,
    )  # fmt: skip
    epochs = [[(row(n), 1.0) for n in range(40)]] * 4
    held = [row(n) for n in range(100, 112)]
    believer = CheckpointTeacher(teacher, TEMPLATE, 512)
    figures = distill_checkpoint(
        source, tmp_path / "taught", plan, epochs, held, believer, tmp_path / "work"
    )
    before, after = figures["before"], figures["after"]
    assert after["p_unsafe_difference"] < 0.5 * before["p_unsafe_difference"]


def test_what_rows_begin_with_is_computed_once_and_nothing_changes(source: Path) -> None:
    model, asker = load_llama(source), Asker.of(source, TEMPLATE, 512)
    lines = [asker.ids(whole_list(row(n))) for n in range(5)] + [[7, *range(60)]]
    for rows in (lines[:5], lines):  # the last begins otherwise
        (batch,) = batched(rows, 10_000)
        apart = read_states(model, batch.ids, batch.lengths)
        shared = read_states(model, batch.ids, batch.lengths, share=True)
        assert torch.allclose(apart, shared, atol=1e-5)
    width = int(batch.lengths.max())
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    (alike,) = batched(lines[:5], 10_000)
    read_states(model, alike.ids, alike.lengths, share=True)
    assert len(seen) == 2 and sum(seen) == alike.ids.shape[1] <= width


def test_a_checkpoint_of_our_own_is_asked_as_it_was_trained(source: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(source, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "guard_template": "compact"}))
    assert official_template(read_config(own)) == "compact"
    assert official_template(config) == "llama-guard-3-1b"
    with pytest.raises(ValueError, match="guard_template is unknown"):
        official_template({**config, "guard_template": ["compact"]})


def test_a_checkpoint_and_the_artifact_made_of_it_believe_the_same(
    source: Path, tmp_path: Path
) -> None:
    export_checkpoint(
        source, tmp_path / "artifact", LLAMA_GUARD_3_1B, Precision(bits=32, embedding_bits=32)
    )
    engine = OnnxEngine(load(tmp_path / "artifact"))
    draw, rng = Draw(shuffle=1.0, drop=1.0), random.Random(1)
    some = [asked(row(n), 1.0, LLAMA_GUARD_3[:13], draw, rng) for n in range(6)]
    of_folder = CheckpointTeacher(source, "llama-guard-3-1b", 512).beliefs(some)
    of_engine = EngineTeacher(engine).beliefs(some)
    assert torch.allclose(of_folder[:, 0].sigmoid(), of_engine[:, 0].sigmoid(), atol=0.03)
    assert torch.allclose(of_folder[:, 1:], of_engine[:, 1:], atol=0.03)
    assert torch.allclose(of_engine[:, 1:].sum(-1), torch.ones(6), atol=1e-4)


class Counting:
    """A teacher that counts what it is asked."""

    def __init__(self) -> None:
        self.rows = 0

    def beliefs(self, asked: object) -> Tensor:
        assert isinstance(asked, list)
        self.rows += len(asked)
        return torch.ones(len(asked), 14)


def test_beliefs_are_computed_once_and_never_taken_for_other_rows(tmp_path: Path) -> None:
    teacher = Counting()
    some = [whole_list(row(n)) for n in range(1030)]
    first = believed(teacher, some, tmp_path)
    again = believed(teacher, some, tmp_path)
    assert teacher.rows == 1030 and first is not None and again is not None
    assert torch.equal(first, again)
    small = min(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    small.unlink()  # of the last six rows
    believed(teacher, some, tmp_path)
    assert teacher.rows == 1036
    believed(teacher, some[1:], tmp_path)
    assert teacher.rows == 1036 + 1029


class Fixed(FakeEngine):
    """A fake whose template lists S1 to S14 whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.card = replace(self.card, template=TEMPLATE)
        self._builder = PromptBuilder(self._tokenizer, TEMPLATE, 512)


def test_an_engine_with_a_fixed_list_refuses_renumbered_ones() -> None:
    shuffled = asked(row(0), 1.0, LLAMA_GUARD_3, Draw(shuffle=1.0), random.Random(0))
    with pytest.raises(ValueError, match="same categories always"):
        EngineTeacher(Fixed()).beliefs([shuffled])


def test_an_engine_with_a_fixed_list_believes_of_what_is_listed() -> None:
    engine = Fixed()
    whole, part = (
        asked(row(0), 1.0, known, Draw(), random.Random(0))
        for known in (LLAMA_GUARD_3, LLAMA_GUARD_3[1:])
    )
    all_of_it, rest = EngineTeacher(engine).beliefs([whole, part]).double()
    total, s1 = all_of_it[0].sigmoid(), all_of_it[0].sigmoid() * all_of_it[1]
    assert rest[0].sigmoid().item() == pytest.approx((total - s1).item(), abs=1e-4)


def test_targets_mix_the_teacher_s_belief_with_the_label(source: Path) -> None:
    asker = Asker.of(source, "llama-guard-3-1b", 512)
    belief = torch.zeros(14)
    belief[0], belief[2] = 2.0, 1.0  # unsafe at 0.88, all of it S2
    mixed = example(asker, whole_list(row(0)), belief, 0.25)
    assert mixed.unsafe == pytest.approx(0.25 * torch.tensor(2.0).sigmoid().item() + 0.75 * 0.985)
    assert mixed.shares is not None
    assert mixed.shares[:2] == pytest.approx([0.75, 0.25]) and sum(mixed.shares) == pytest.approx(1)
    alone = example(asker, whole_list(row(0)), None, 0.0)
    assert alone.shares is not None and alone.shares[0] == 1.0
    assert example(asker, whole_list(row(1)), None, 0.0).shares is None
    assert alone.ids[-3:] == mixed.ids[-3:] and len(alone.columns) == 13


def test_the_loss_is_the_cross_entropy_of_verdict_and_first_code() -> None:
    logits = torch.zeros(2, 2, 8)
    logits[0, 0, 1] = 2.0
    logits[0, 1, 6] = 1.0
    batch = [Example([1], [6, 7], 1.0, [1.0, 0.0], 1.0), Example([1], [6, 7], 0.0, None, 0.5)]
    verdict = math.log(1 + math.exp(-2.0))
    code = math.log(1 + math.exp(-1.0))
    wanted = (verdict + 0.35 * code + 0.5 * math.log(2)) / 2
    assert loss_of(logits, batch, 0.35).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shuffle": 0.5}, "same categories always"),
        ({"trust": 0.5}, "there is no teacher"),
        ({"template": "llama"}, "is unknown"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(
    source: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    fields = {"template": TEMPLATE, "trust": 0.0, "shuffle": 0.0, "drop": 0.0, **changes}
    plan = DistillPlan(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        distill_checkpoint(source, tmp_path / "out", plan, [], [], None, tmp_path / "work")
