"""A checkpoint judges as the artifact made of it does."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from guard_quantization.evaluation.evaluate import score_rows
from guard_quantization.evaluation.judges import CheckpointJudge, judge_digest, open_judge
from guard_quantization.export.decoder import ExportError, Precision
from guard_quantization.export.hf import export_checkpoint
from guard_service.artifact import ArtifactError
from tests.quantization.evaluation.test_stage import data
from tests.quantization.tiny_llama import saved, tiny_llama
from tests.service.tiny_artifact import tiny_artifact


def test_checkpoint_and_its_exact_artifact_give_the_same_scores(tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.05, max_position_embeddings=4096)
    llama = saved(model, tmp_path / "llama")
    export_checkpoint(llama, tmp_path / "exact", precision=Precision(bits=32, embedding_bits=32))
    rows = data(6)
    with closing(open_judge(llama)) as judge, closing(open_judge(tmp_path / "exact")) as engine:
        assert isinstance(judge, CheckpointJudge) and judge.card.template == engine.card.template
        before, after = score_rows(judge, rows), score_rows(engine, rows)
        assert judge.card.categories == engine.card.categories
    assert np.ptp(before.unsafe) > 1e-3
    np.testing.assert_allclose(before.unsafe, after.unsafe, atol=1e-4)
    np.testing.assert_allclose(before.codes, after.codes, atol=1e-3)
    assert judge_digest(llama) == judge.card.digest.removeprefix("sha256:")


def test_folder_that_is_no_checkpoint_is_refused_with_its_name(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ExportError, match="llama"):
        open_judge(tmp_path / "llama")


def test_an_artifact_judges_by_the_plan_it_is_named_with(tmp_path: Path) -> None:
    place = tiny_artifact(tmp_path / "at@home").folder
    assert judge_digest(f"{place}@stored") == judge_digest(place) != judge_digest(f"{place}@int8")
    with closing(open_judge(place)) as stored, closing(open_judge(f"{place}@int8")) as int8:
        assert (stored.card.plan, int8.card.plan) == ("stored", "int8")
    with pytest.raises(ArtifactError, match="at@other"):
        open_judge(tmp_path / "at@other")
