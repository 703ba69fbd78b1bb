"""The student: lessons, losses, rounded weights, and that it learns."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard_policies.assessment import Direction
from guard_quantization.data import Row
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.llama import GuardLlama, LlamaShape
from guard_quantization.starter.student import (
    CODE_ROWS,
    HEAD_ROWS,
    UNSAFE_ROW,
    Classroom,
    Student,
    distill,
    feature_loss,
    judge_rows,
    verdict_loss,
)
from guard_quantization.starter.teacher import CODES
from guard_quantization.starter.vocabulary import train_tokenizer
from guard_service.prompt import PromptBuilder

BAD, GOOD = ("burn", "steal", "hurt"), ("bake", "paint", "plant")


def row(number: int, text: str, unsafe: bool, reply: str | None = None) -> Row:
    turns = (("user", text),) if reply is None else (("user", text), ("assistant", reply))
    codes = ("S2",) if unsafe else ()
    return Row(f"r{number}", turns, unsafe, codes, "en", "s", "f", "train")


def rows(count: int) -> list[Row]:
    rng = random.Random(0)
    made = []
    for n in range(count):
        unsafe = n % 2 == 0
        word = rng.choice(BAD if unsafe else GOOD)
        text = f"please {word} the {rng.choice(('red', 'old', 'big'))} house"
        made.append(row(n, text, unsafe) if n % 4 < 2 else row(n, "go on", unsafe, text))
    return made


@pytest.fixture(scope="module")
def classroom() -> Classroom:
    texts = [text for r in rows(60) for _, text in r.turns]
    tokenizer = train_tokenizer(texts, 420, "compact-fixed")
    verdict = verdict_tokens(tokenizer, CODES)
    assert verdict.head[UNSAFE_ROW] == verdict.unsafe
    assert list(verdict.head[CODE_ROWS]) == [verdict.codes[code] for code in CODES]
    assert len(verdict.head) == HEAD_ROWS
    builder = PromptBuilder(tokenizer, "compact-fixed", 1024)
    spoken = (verdict.unsafe, verdict.newline, verdict.mark)
    return Classroom(builder, spoken, {"r0": 0, "r1": 1}, trust=0.4)


def student() -> Student:
    torch.manual_seed(0)
    shape = LlamaShape(420, 64, 96, 2, 2, 2, head_dim=32, max_position_embeddings=1024)
    return Student(GuardLlama(shape, HEAD_ROWS), 16)


def test_lessons_are_the_serving_prompt_with_the_verdict_spoken(classroom: Classroom) -> None:
    lesson = classroom.lesson(row(0, "please bake", False), 1.0, None)
    text = classroom.builder._tokenizer.decode(lesson.ids, skip_special_tokens=False)
    assert text.startswith("User: please bake\n\n<END CONVERSATION>")
    assert text.endswith("assistant<|end_header_id|>\n\nunsafe\nS")


def test_a_long_text_keeps_its_beginning_and_its_end(classroom: Classroom) -> None:
    lesson = classroom.lesson(row(0, "start " + "x y " * 900 + " finish", False), 1.0, None)
    text = classroom.builder._tokenizer.decode(lesson.ids)
    assert "start" in text and "finish" in text and len(text) < 700


def test_the_loss_follows_the_label_and_leans_to_the_teacher(classroom: Classroom) -> None:
    lesson = classroom.lesson(row(0, "please bake", False), 1.0, None)
    logits = torch.zeros(1, 2, HEAD_ROWS)
    logits[0, 0, UNSAFE_ROW] = -3.0
    believes = torch.zeros(2, 1 + len(CODES))
    believes[0, 0] = 6.0
    doubted = verdict_loss(logits, [lesson], believes)
    confirmed = verdict_loss(logits, [lesson], -believes)
    assert confirmed.item() < 0.3 < doubted.item()


def test_without_a_label_only_the_teacher_counts(classroom: Classroom) -> None:
    unlabelled = replace(row(0, "please bake", False), labelled=False, categories=None)
    lesson = classroom.lesson(unlabelled, 1.0, None)
    logits = torch.zeros(1, 2, HEAD_ROWS)
    logits[0, 0, UNSAFE_ROW] = 3.0
    believes = torch.zeros(2, 1 + len(CODES))
    believes[0, 0], believes[0, 3] = 6.0, 20.0
    told = verdict_loss(logits, [lesson], believes).item()
    logits[0, 1, CODE_ROWS] = believes[0, 1:]
    assert verdict_loss(logits, [lesson], believes).item() < told - 0.3  # the code counts too
    assert verdict_loss(-logits, [lesson], believes).item() > told + 1


def test_features_count_only_where_the_teacher_looked(classroom: Classroom) -> None:
    seen = classroom.lesson(row(1, "please bake", False), 1.0, None)
    unseen = classroom.lesson(row(9, "please bake", False), 1.0, None)
    pooled = torch.eye(2, 16)
    loss = feature_loss(pooled[[1, 0]], [seen, unseen], pooled)
    assert loss.tolist() == [0.0, 0.0]
    assert feature_loss(-pooled[[1, 0]], [seen, unseen], pooled).tolist() == [2.0, 0.0]


def test_the_student_learns_what_tells_the_rows_apart(classroom: Classroom, tmp_path: Path) -> None:
    model = student()
    epoch = [(r, 1.0) for r in rows(240)]
    views = torch.zeros(2, 1 + len(CODES)), torch.ones(2, 16)
    distill(
        model,
        classroom,
        [epoch] * 5,
        views,
        tmp_path / "s.pt",
        lr=4e-3,
        embedding_lr=1e-2,
        tokens=512,
    )
    fresh = [row(900, "please hurt the old house", True), row(901, "please paint it", False)]
    fresh += [row(902, "go on", True, "please steal it"), row(903, "go on", False, "please bake")]
    unsafe, codes = judge_rows(model, classroom, fresh)
    assert (unsafe > 0).tolist() == [True, False, True, False]
    assert codes[0].argmax() == CODES.index("S2")


def test_both_directions_have_a_prefix_of_their_own(classroom: Classroom) -> None:
    prompt, response = (classroom.prefix(direction) for direction in Direction)
    assert prompt.tolist() != response.tolist()


def test_a_fresh_student_pools_what_it_reads() -> None:
    shape = LlamaShape(50, 64, 96, 1, 2, 2, head_dim=32, max_position_embeddings=64)
    torch.manual_seed(0)
    llama = GuardLlama(shape, 3).eval()
    llama.pool_last()
    last = llama.model["layers"][0].self_attn  # type: ignore[index]
    x = torch.randn(1, 6, 64) * 0.02  # scores near nought: attention is even
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    pooled, _ = last(x, torch.ones(6, 16), torch.zeros(6, 16), mask, None)
    assert torch.allclose(pooled[0, -1], 2 * x[0].mean(0), atol=1e-3)
    narrow = GuardLlama(LlamaShape(50, 64, 96, 1, 2, 1, head_dim=32), 3)
    with pytest.raises(ValueError, match="pooling needs"):
        narrow.pool_last()


def test_reading_in_the_last_layer_only_changes_nothing() -> None:
    shape = LlamaShape(50, 64, 96, 3, 2, 1, head_dim=32, max_position_embeddings=64)
    torch.manual_seed(0)
    llama = GuardLlama(shape, 5).eval()
    prefix, rows = torch.randint(0, 50, (7,)), torch.randint(0, 50, (4, 11))
    read = torch.tensor([[3, 6], [5, 8], [7, 10], [1, 4]])
    found = llama(prefix, rows, read)
    for at in range(4):
        whole, _ = llama._run(torch.cat([prefix, rows[at]])[None], 0, None)
        wanted = llama.lm_head(llama.model["norm"](whole))[0, 7 + read[at]]  # type: ignore[operator]
        assert torch.allclose(found[at], wanted, atol=1e-5)
