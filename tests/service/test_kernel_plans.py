"""Kernel plans: each scores like the stored weights, the fastest is chosen, its graph is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from guard_quantization.export.decoder import Precision
from guard_quantization.export.int4 import quantize_blocks
from guard_service.artifact import Artifact, write_artifact
from guard_service.engines import EngineFailed, choosing, loading, open_engine
from guard_service.engines.expanding import EIGHT_BITS, SEVEN_BITS, matrices
from guard_service.engines.graph_files import Tensor, UnreadableGraph
from guard_service.engines.loading import plans_of
from guard_service.engines.onnx import OnnxEngine
from guard_service.engines.plans import AUTO, INT8, PLANS, STORED
from guard_service.engines.prepared import DATA, GRAPH, Prepared
from tests.service.tiny_artifact import tiny_artifact

INT4 = Precision(bits=4, block=32, embedding_bits=4)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_artifact(tmp_path_factory.mktemp("tiny") / "guard", precision=INT4)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_scores_the_golden_prompts(artifact: Artifact, plan: str) -> None:
    engine = OnnxEngine(artifact, plan=plan)
    engine.self_test()
    assert engine.card.plan == plan


def test_a_plan_that_the_artifact_lacks_is_refused_by_name(tmp_path: Path) -> None:
    floats = tiny_artifact(tmp_path / "guard", precision=Precision(32, embedding_bits=32))
    assert plans_of(floats) == (STORED,)
    with pytest.raises(EngineFailed, match="no graph for kernel plan 'int8'; it has stored"):
        open_engine(floats.folder, plan=INT8)


def test_the_fastest_plan_is_chosen_and_remembered(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {STORED: 2.0, INT8: 1.0, "fp32": 3.0}
    monkeypatch.setattr(choosing, "_time", lambda a, threads, plan, prepared: times[plan])
    assert open_engine(artifact.folder, plan=AUTO, prepared=tmp_path).card.plan == INT8
    times.update({STORED: 0.1})
    assert open_engine(artifact.folder, plan=AUTO, prepared=tmp_path).card.plan == INT8
    assert open_engine(artifact.folder, 2, plan=AUTO, prepared=tmp_path).card.plan == STORED


def test_a_choice_that_is_damaged_is_made_anew(artifact: Artifact, tmp_path: Path) -> None:
    open_engine(artifact.folder, plan=AUTO, prepared=tmp_path)
    (choice,) = tmp_path.glob("*.json")
    for damage in (b"", b"{", b'{"plan": 3}', b'{"plan": "../x"}', b"[" * 100_000):
        choice.write_bytes(damage)
        assert open_engine(artifact.folder, plan=AUTO, prepared=tmp_path).card.plan in PLANS
        assert json.loads(choice.read_bytes())["plan"] in PLANS


def test_a_plan_that_scores_otherwise_is_not_chosen(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = dataclasses.replace(artifact.manifest, tolerance=1e-6)
    files = {name: artifact.folder / name for name in artifact.manifest.files}
    strict_artifact = write_artifact(tmp_path / "strict", strict, files)
    assert open_engine(strict_artifact.folder, plan=AUTO).card.plan == STORED
    hopeless = dataclasses.replace(
        strict, golden=tuple(dataclasses.replace(g, unsafe=g.unsafe / 2) for g in strict.golden)
    )
    folder = write_artifact(tmp_path / "hopeless", hopeless, files).folder
    with pytest.raises(EngineFailed, match="golden prompts score up to"):
        open_engine(folder, plan=AUTO)


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_WORTH_KEEPING", 1)


@pytest.mark.usefixtures("keep")
def test_a_graph_made_ready_is_kept_and_scores_the_same(artifact: Artifact, tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    fresh = OnnxEngine(artifact, plan=INT8)
    first = OnnxEngine(artifact, plan=INT8, prepared=prepared)
    graph = prepared.graph(artifact.digest, INT8)
    assert graph is not None
    made = graph.stat().st_mtime_ns
    second = OnnxEngine(artifact, plan=INT8, prepared=prepared)
    assert graph.stat().st_mtime_ns == made
    turns = [("user", "a question of some length, to be scored by all")]
    assert first.score(turns) == second.score(turns) == fresh.score(turns)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("keep")
@pytest.mark.parametrize("damage", [b"", b"\x08\x09not a graph"])
def test_a_kept_graph_that_is_damaged_is_made_anew(
    artifact: Artifact, tmp_path: Path, damage: bytes
) -> None:
    prepared = Prepared(tmp_path)
    OnnxEngine(artifact, plan=INT8, prepared=prepared)
    graph = prepared.graph(artifact.digest, INT8)
    assert graph is not None
    whole = graph.read_bytes()
    graph.write_bytes(damage)
    OnnxEngine(artifact, plan=INT8, prepared=prepared).self_test()
    assert graph.read_bytes() == whole


@pytest.mark.usefixtures("keep")
def test_a_kept_graph_without_its_weights_is_made_anew(artifact: Artifact, tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    OnnxEngine(artifact, plan=INT8, prepared=prepared)
    graph = prepared.graph(artifact.digest, INT8)
    assert graph is not None
    (graph.parent / DATA).write_bytes(b"cut short")
    OnnxEngine(artifact, plan=INT8, prepared=prepared).self_test()


@pytest.mark.usefixtures("keep")
def test_a_folder_that_others_may_write_is_neither_read_nor_written(
    artifact: Artifact, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    OnnxEngine(artifact, plan=INT8, prepared=Prepared(tmp_path)).self_test()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_in_one_where_others_may_replace_it_is_not_used(tmp_path: Path, mode: int) -> None:
    within = tmp_path / "between" / "prepared"
    assert Prepared(within).folder == within
    (tmp_path / "between").chmod(mode)
    assert Prepared(within).folder is None
    (tmp_path / "between").chmod(mode | 0o1000)  # as /tmp: others may add, but not replace
    assert Prepared(within).folder == within


def kept_graph(prepared: Prepared, name: str) -> Path:
    """A folder of files that nobody loads."""

    def write(folder: Path) -> None:
        for file in (GRAPH, DATA):
            (folder / file).write_bytes(name.encode())

    made = prepared.make(name, INT8, write)
    assert made is not None
    return made.parent


@pytest.mark.parametrize("trick", ["writable", "link"])
def test_a_graph_that_others_could_have_put_there_is_not_used(tmp_path: Path, trick: str) -> None:
    prepared = Prepared(tmp_path / "prepared")
    place = kept_graph(prepared, "one")
    if trick == "writable":
        place.chmod(0o777)
    else:
        place.symlink_to(place.rename(tmp_path / "elsewhere"))
    assert prepared.graph("one", INT8) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_what_another_user_owns_is_not_used(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path / "prepared")
    os.chown(kept_graph(prepared, "one"), 12345, -1)
    assert prepared.graph("one", INT8) is None
    os.chown(tmp_path / "prepared", 12345, -1)
    assert Prepared(tmp_path / "prepared").folder is None


def test_graphs_that_were_not_used_for_longest_make_room_for_new_ones(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    places = {name: kept_graph(prepared, name) for name in "abcd"}
    with (places["b"] / DATA).open("rb") as mapped:  # by a process that runs on
        for age, name in enumerate("abcd", 1):
            os.utime(places[name], (age, age))
        assert prepared.graph("a", INT8)  # a is used, so b is now the oldest
        kept_graph(prepared, "e")
        assert {name for name in "abcde" if prepared.graph(name, INT8)} == {*"acde"}
        assert mapped.read() == b"b"


def test_drafts_of_killed_processes_go_and_those_at_work_stay(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    killed, at_work = tmp_path / ".making-killed", tmp_path / ".making-now"
    for draft in (killed, at_work):
        draft.mkdir()
        (draft / DATA).write_bytes(b"half")
    os.utime(killed, (1, 1))
    kept_graph(prepared, "one")
    assert not killed.exists() and at_work.exists()


def test_choices_are_bounded(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    for number in range(70):
        prepared.choose(str(number), 1, INT8, {})
    kept_graph(prepared, "one")
    assert len([*tmp_path.glob("*.json")]) == 64


@pytest.mark.usefixtures("keep")
def test_without_room_a_graph_is_loaded_all_the_same(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "_write", full)
    OnnxEngine(artifact, plan=INT8, prepared=Prepared(tmp_path)).self_test()
    assert not [*tmp_path.rglob(GRAPH)]


def test_lanes_score_at_the_same_time_what_one_scores(artifact: Artifact) -> None:
    texts = [f"question number {number}" for number in range(24)]
    one, three = OnnxEngine(artifact), OnnxEngine(artifact, lanes=3)
    wanted = [one.score([("user", text)]) for text in texts]
    found = dict[int, object]()

    def work(mine: Sequence[int]) -> None:
        for at in mine:
            found[at] = three.score([("user", texts[at])])

    threads = [threading.Thread(target=work, args=(range(at, 24, 3),)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(24)] == wanted


def test_close_does_not_wait_for_a_run_that_hangs(artifact: Artifact) -> None:
    engine = OnnxEngine(artifact)
    engine._free.get()  # what a run in progress holds
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 80])
@pytest.mark.parametrize("largest", [SEVEN_BITS, EIGHT_BITS])
def test_expanded_matrices_are_what_the_blocks_stand_for(
    bits: int, columns: int, largest: int
) -> None:
    weight = np.random.default_rng(1).standard_normal((24, columns)).astype(np.float32)
    blocks = quantize_blocks(weight, bits, 32)
    stored = {
        f"w.{kind}": Tensor(f"w.{kind}", array.shape, array.tobytes(), "", 0, 0)
        for kind, array in (("codes", blocks.packed()), ("scales", blocks.scales))
    }
    wanted = [Tensor("w.fp32", (columns, 24), b"", "expanded", 0, 0)]
    wanted += [Tensor("w.int8", (columns, 24), b"", "expanded", 0, 0)]
    made = matrices(Path(), stored, wanted, bits, largest)
    whole = blocks.dequantize().astype(np.float64)
    np.testing.assert_array_equal(made["w.fp32"], whole.T)
    scales = np.abs(whole).max(1) / largest
    np.testing.assert_allclose(made["w.int8_scales"], scales, rtol=1e-6)
    assert np.abs(made["w.int8"].astype(int)).max() == largest
    error = made["w.int8"] * scales - whole.T
    assert (np.abs(error) <= 0.5001 * scales).all()


@pytest.mark.parametrize(
    ("dims", "stored"),
    [
        ((64, 25), (24, 2, 16)),
        ((640, 24), (24, 2, 16)),
        ((64, 24), (24, 3, 16)),
        ((64,), (24, 2, 16)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    dims: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    codes = np.zeros(stored, np.uint8)
    scales = np.zeros((24, 2), np.float16)
    known = {
        "w.codes": Tensor("w.codes", codes.shape, codes.tobytes(), "", 0, 0),
        "w.scales": Tensor("w.scales", scales.shape, scales.tobytes(), "", 0, 0),
    }
    with pytest.raises(UnreadableGraph):
        matrices(Path(), known, [Tensor("w.int8", dims, b"", "expanded", 0, 0)], 4, 127)


CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.skipif(CUDA, reason="this onnxruntime has CUDA")
def test_cuda_that_is_not_there_is_refused_with_the_cure(artifact: Artifact) -> None:
    with pytest.raises(EngineFailed, match="install onnxruntime-gpu"):
        open_engine(artifact.folder, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="this onnxruntime has no CUDA")
@pytest.mark.parametrize("plan", [STORED, "fp32"])
def test_on_cuda_the_golden_prompts_score_the_same(artifact: Artifact, plan: str) -> None:
    engine = open_engine(artifact.folder, plan=plan, device="cuda")
    engine.self_test()
