"""The ONNX engine: scores from one pass, snapshots, batches, and what it refuses."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from guard_policies.assessment import Direction
from guard_policies.taxonomy import LLAMA_GUARD_3, Category
from guard_quantization.export.decoder import Precision
from guard_service.artifact import Artifact, load, write_artifact
from guard_service.conversation import Conversation, Image
from guard_service.engines import Assessed, EngineFailed, open_engine
from guard_service.engines.graph_files import UnreadableGraph, graph_tensors
from guard_service.engines.onnx import OnnxEngine
from guard_service.engines.snapshots import Snapshot, Snapshots
from guard_service.manifest import Calibration
from guard_service.prompt import Prompt
from tests.service.tiny_artifact import CODES, RELEASE, tiny_artifact, tiny_weights

TEXTS = ("", "hi", "a longer text, " * 6, "hi", "x" * 100, "Привет", "the end")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_artifact(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> OnnxEngine:
    return OnnxEngine(artifact)


def prompts_of(engine: OnnxEngine, *texts: str, count: int = 14) -> list[Prompt]:
    categories = LLAMA_GUARD_3[:count]
    return [
        prompt
        for text in texts
        for prompt in engine.prompt_builder()
        .build(Conversation.of(("user", text)), categories)
        .prompts
    ]


def scores(found: list[Assessed]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array(
        [[a.assessment.unsafe_score, *a.assessment.category_scores.values()] for a in found]
    )


def test_category_scores_share_out_the_unsafe_score(engine: OnnxEngine) -> None:
    (found,) = engine.assess(prompts_of(engine, "hello"))
    assessment = found.assessment
    assert tuple(assessment.category_scores) == CODES
    assert 0 < assessment.unsafe_score < 1
    assert sum(assessment.category_scores.values()) == pytest.approx(assessment.unsafe_score)


@pytest.mark.parametrize("precision", [Precision(32, embedding_bits=32), Precision()], ids=str)
def test_batched_answers_equal_single_ones(tmp_path: Path, precision: Precision) -> None:
    engine = OnnxEngine(tiny_artifact(tmp_path / "tiny", precision=precision))
    prompts = prompts_of(engine, *TEXTS) + prompts_of(engine, *TEXTS, count=13)
    prompts = prompts[::2] + prompts[1::2]  # prefixes interleaved
    together = engine.assess(prompts)
    alone = [engine.assess([prompt])[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert tuple(one.assessment.category_scores) == tuple(other.assessment.category_scores)
        np.testing.assert_allclose(scores([one]), scores([other]), atol=1e-6)


def test_the_prefix_snapshot_changes_no_score(artifact: Artifact, engine: OnnxEngine) -> None:
    plain = OnnxEngine(artifact, prefix_cache=False)
    prompts = prompts_of(engine, *TEXTS)
    np.testing.assert_allclose(
        scores(engine.assess(prompts)), scores(plain.assess(prompts)), atol=2e-3
    )


def test_only_the_first_prompt_pays_for_a_prefix(artifact: Artifact) -> None:
    engine = OnnxEngine(artifact)
    prompts = prompts_of(engine, "one", "one", "one")
    prefix, own = len(prompts[0].prefix), len(prompts[0].body) + len(prompts[0].closing) + 3
    first, second, third = engine.assess(prompts)
    assert (first.computed_tokens, first.cached_tokens) == (prefix + own, 0)
    for later in (second, third, *engine.assess(prompts)):
        assert (later.computed_tokens, later.cached_tokens) == (own, prefix)
    plain = OnnxEngine(artifact, prefix_cache=False)
    assert plain.assess(prompts)[1].computed_tokens == prefix + own
    assert plain.assess(prompts)[1].cached_tokens == 0


def test_a_policy_brings_categories_of_its_own(engine: OnnxEngine) -> None:
    own = [Category("S2", "Pineapple", "Praise of pineapple on pizza"), Category("S17", "Rain")]
    built = engine.prompt_builder().build(Conversation.of(("user", "hi")), own)
    (found,) = engine.assess(built.prompts)
    assert tuple(found.assessment.category_scores) == ("S2", "S17")


def test_a_prompt_the_model_cannot_judge_fails_instead_of_scoring(engine: OnnxEngine) -> None:
    (prompt,) = prompts_of(engine, "hi")
    for broken, said in (
        (replace(prompt, categories=("S1", "S77")), "no code"),
        (replace(prompt, categories=()), "no code"),
        (replace(prompt, image=Image(b"...")), "images"),
        (replace(prompt, body=prompt.body * 2000), "tokens"),
        (replace(prompt, body=(10**6,)), "onnxruntime"),
    ):
        with pytest.raises(EngineFailed, match=said):
            engine.assess([prompt, broken])


def test_logits_that_are_not_finite_are_no_verdict(tmp_path: Path) -> None:
    weights = tiny_weights()
    healthy = tiny_artifact(tmp_path / "healthy", weights=weights)
    weights["model.norm.weight"] = np.full(64, np.nan, np.float32)
    with pytest.raises(EngineFailed, match="not finite"):
        tiny_artifact(tmp_path / "ill", weights=weights)
    assert not (tmp_path / "ill").exists()
    OnnxEngine(healthy).self_test()


def test_calibration_is_applied_per_direction(tmp_path: Path) -> None:
    turns = {
        Direction.PROMPT: [("user", "hello")],
        Direction.RESPONSE: [("user", "hello"), ("assistant", "hi")],
    }
    plain = OnnxEngine(tiny_artifact(tmp_path / "plain"))
    calibration = {Direction.PROMPT: Calibration(2.0, -1.0), Direction.RESPONSE: Calibration()}
    release = replace(RELEASE, calibration=calibration)
    fitted = OnnxEngine(tiny_artifact(tmp_path / "fitted", release))
    for way, conversation in turns.items():
        before = plain.score(conversation).unsafe
        logit = np.log(before / (1 - before))
        wanted = calibration[way].probability(float(logit))
        assert fitted.score(conversation).unsafe == pytest.approx(wanted, abs=1e-6)


def test_self_test_fails_when_golden_scores_differ(artifact: Artifact) -> None:
    OnnxEngine(artifact).self_test()
    first, *others = artifact.manifest.golden
    moved = replace(first, unsafe=first.unsafe + 0.1)
    for golden, said in (((moved, *others), "differently"), ((), "no golden")):
        changed = replace(artifact, manifest=replace(artifact.manifest, golden=golden))
        with pytest.raises(EngineFailed, match=said):
            OnnxEngine(changed).self_test()


def test_a_graph_that_does_not_fit_its_manifest_is_refused(artifact: Artifact) -> None:
    geometry = replace(artifact.manifest.geometry, layers=3)
    verdict = replace(artifact.manifest.verdict, head=artifact.manifest.verdict.head + (9,))
    for change, said in ((dict(geometry=geometry), "inputs"), (dict(verdict=verdict), "logits")):
        changed = replace(artifact, manifest=replace(artifact.manifest, **change))
        with pytest.raises(EngineFailed, match=said):
            OnnxEngine(changed)


def test_a_file_that_is_no_graph_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"\xff\x00 not a graph" * 9)
    files = {name: artifact.folder / name for name in artifact.manifest.files}
    broken = write_artifact(tmp_path / "broken", artifact.manifest, {**files, "model.onnx": noise})
    with pytest.raises(EngineFailed, match="cannot be loaded"):
        OnnxEngine(broken)


@pytest.mark.parametrize("location", [b"../el.onnx.data", b"/tmp/onnx.datas"])
def test_weights_outside_the_folder_are_refused(
    artifact: Artifact, tmp_path: Path, location: bytes
) -> None:
    (tmp_path / "el.onnx.data").write_bytes((artifact.folder / "model.onnx.data").read_bytes())
    graph = tmp_path / "graph"
    content = artifact.model.read_bytes()  # a location of the same length keeps it well-formed
    graph.write_bytes(content.replace(b"model.onnx.data", location, 1))
    files = {name: artifact.folder / name for name in artifact.manifest.files}
    led = write_artifact(tmp_path / "led", artifact.manifest, {**files, "model.onnx": graph})
    with pytest.raises(EngineFailed, match="file that the manifest lacks"):
        OnnxEngine(led)


def graph_files(content: bytes) -> set[str]:
    return {tensor.location for tensor in graph_tensors(content) if tensor.location}


def test_graphs_that_could_hide_weights_are_refused() -> None:
    def nested(subgraph: bool) -> bytes:
        tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="deep.data")
        inner = helper.make_graph([], "inner", [], [], [tensor])
        value = {"body": inner} if subgraph else {"value": tensor}
        node = helper.make_node("Loop" if subgraph else "Constant", [], ["y"], **value)
        content: bytes = helper.make_model(
            helper.make_graph([node], "outer", [], [])
        ).SerializeToString()
        return content

    assert graph_files(nested(subgraph=False)) == {"deep.data"}
    with pytest.raises(UnreadableGraph, match="subgraphs"):
        graph_files(nested(subgraph=True))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 15_000))
def test_any_bytes_are_read_or_refused(artifact: Artifact, noise: bytes, at: int) -> None:
    content = artifact.model.read_bytes()
    for broken in (noise, content[:at] + noise + content[at + len(noise) :], content[:at]):
        with contextlib.suppress(UnreadableGraph):
            assert all(isinstance(name, str) for name in graph_files(broken))


def test_snapshots_are_bounded_by_bytes_and_the_longest_unused_go() -> None:
    def snapshot(size: int) -> Snapshot:
        return Snapshot((1,), {"k": np.zeros(size // 4, np.float32)})

    held: Snapshots[Snapshot] = Snapshots(most_bytes=100)
    held.put((1,), snapshot(40))
    held.put((2,), snapshot(40))
    assert held.get((1,)) is not None
    held.put((3,), snapshot(40))
    held.put((4,), snapshot(400))
    assert [held.get((key,)) is not None for key in (1, 2, 3, 4)] == [True, False, True, False]
    held.clear()
    assert held.get((1,)) is None


def test_snapshots_may_be_shared_between_threads() -> None:
    held: Snapshots[Snapshot] = Snapshots(most_bytes=1000)

    def work(seed: int) -> None:
        for at in range(200):
            held.put((seed * at % 7,), Snapshot((1,), {"k": np.zeros(50, np.float32)}))
            held.get((at % 7,))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 5)))
    assert sum(held.get((key,)) is not None for key in range(7)) == 5


def test_a_model_is_opened_by_name_or_folder(artifact: Artifact) -> None:
    assert open_engine("fake").card.engine == "fake"
    engine = open_engine(artifact.folder)
    engine.self_test()
    assert engine.card.digest == load(artifact.folder).digest
    assert engine.card.categories == CODES
    document = json.loads((artifact.folder / "guard.json").read_text())
    assert engine.card.parameters == document["parameters"]
    engine.close()
