"""guardctl bulk on a Ray cluster of three nodes, one of which dies half way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard_service.cli import bulk_shards, exits
from guard_service.cli.bulk_run import How
from guard_service.cli.place import Place

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
LINES, BLOCK_LINES = 1200, 40


@pytest.mark.usefixtures("ray_environment")
def test_each_line_has_one_answer_though_a_node_dies(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: make test-ray")
    from tests.on_ray.cluster import NODES, trial

    found = trial(tmp_path, LINES, "fake", BLOCK_LINES)
    assert found["nodes at the end"] == NODES - 1
    assert found["exit code"] == exits.OK
    assert found["lines in"] == found["lines out"] == found["with a verdict"] == LINES
    assert found["duplicates"] == found["missing"] == found["not asked for"] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["lines_out"], summary["twice"], summary["missing"]) == (LINES, 0, 0)


@pytest.mark.usefixtures("ray_environment")
def test_what_is_wrong_with_the_guard_ends_the_run_with_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="needs Ray: make test-ray")
    from tests.on_ray.cluster import three_nodes

    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    how = How("nobody", "", 4, 60.0, 60.0, restart=False)
    with three_nodes():
        shards = bulk_shards.Shards(BLOCK_LINES, ray="auto", cpus=1)
        code = bulk_shards.run(
            tmp_path / "in.jsonl", tmp_path / "out", Place(model="fake"), how, shards
        )
    assert code == exits.UNFINISHED
    assert "no policy of that name" in capsys.readouterr().err
