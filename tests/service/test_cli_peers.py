"""Peers write what their model writes, with and without a known prefix, and count it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from guard_service.cli.peers import Peer, PeerUnavailable, Question, needed, open_peer
from tests.quantization.export.test_gguf import HEAD, cut
from tests.quantization.tiny_llama import saved, tiny_llama
from tests.service.torch import checkpoints

Make = Callable[[], Peer]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def whole(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(model, tmp_path_factory.mktemp("whole") / "llama")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer is a guard's."""
    folder = tmp_path_factory.mktemp("guard") / "tiny"
    return checkpoints.saved(checkpoints.tiny_llama(), folder)


def question(seed: int, prefix: int = 1) -> Question:
    draws = torch.Generator().manual_seed(seed)
    same = torch.Generator().manual_seed(100 + prefix)
    pieces = ((40, same), (9, draws), (7, draws))
    drawn = [tuple(torch.randint(300, (size,), generator=g).tolist()) for size, g in pieces]
    return Question(drawn[0], drawn[1], drawn[2], ("S1",))


def greedy(model: LlamaForCausalLM, ids: list[int], count: int, head: bool) -> tuple[int, ...]:
    """What the model writes; with `head`, logits of other tokens than those of verdicts are 0."""
    written: list[int] = []
    for _ in range(count):
        logits = model(torch.tensor([[*ids, *written]])).logits[0, -1]
        if head:
            zeros = torch.zeros_like(logits)
            zeros[list(HEAD)] = logits[list(HEAD)]
            logits = zeros
        written.append(int(logits.argmax()))
    return tuple(written)


def writes_as_the_model_does(peer: Peer, model: LlamaForCausalLM, head: bool = False) -> None:
    for seed, prefix, known in ((1, 1, 0), (2, 1, 40), (3, 2, 0), (4, 2, 40)):
        asked = question(seed, prefix)
        found = peer.verdict(asked, 4)
        assert found.written == greedy(model, asked.ids, 4, head)
        assert found.computed == len(asked.ids) - known + 3
    assert peer.verdict(question(5, 2), 1).computed == 9 + 7


def test_transformers_writes_as_the_model_does(model: LlamaForCausalLM, whole: Path) -> None:
    writes_as_the_model_does(open_peer("transformers-fp32", whole, 1), model)
    assert len(open_peer("transformers-bf16", whole, 1).verdict(question(1), 4).written) == 4


def test_transformers_puts_a_cut_head_among_zeros(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = cut(model, tmp_path / "cut")
    writes_as_the_model_does(open_peer("transformers-fp32", folder, 1), model, head=True)


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_optimums_export_writes_as_the_model_does(
    model: LlamaForCausalLM, tmp_path: Path, is_cut: bool
) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    from guard_quantization.export.reference import export_reference

    source = cut(model, tmp_path / "cut") if is_cut else saved(model, tmp_path / "whole")
    export_reference(source, tmp_path / "reference")
    peer = open_peer("onnx", tmp_path / "reference", 1)
    if is_cut:  # only the tokens of verdicts have a column
        found = peer.verdict(question(1), 4)
        assert set(found.written) <= set(HEAD)
        assert peer.verdict(question(2), 4).computed == 9 + 7 + 3
    else:
        writes_as_the_model_does(peer, model)


def test_llama_cpp_keeps_the_prefix_and_writes_so_many_tokens(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from guard_quantization.export.gguf import write_gguf

    write_gguf(whole, tmp_path / "f16.gguf", "f16")
    peer = open_peer("gguf", tmp_path / "f16.gguf", 1)
    for seed, known in ((1, 0), (2, 40), (3, 40)):
        asked = question(seed)
        found = peer.verdict(asked, 4)
        assert len(found.written) == 4 and found.computed == len(asked.ids) - known + 3


def test_our_torch_engine_is_a_peer_that_reads_the_verdict_in_one_pass(text_folder: Path) -> None:
    for kind in ("torch-fp32", "torch-bf16"):
        peer = open_peer(kind, text_folder, 1)
        for seed, known in ((1, 0), (2, 40), (3, 40)):
            asked = question(seed)
            found = peer.verdict(asked, 4)
            assert found.written == () and found.computed == len(asked.ids) - known + 3


def test_what_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="no such file"):
        open_peer("gguf", tmp_path / "none.gguf", 1)
    with pytest.raises(PeerUnavailable, match=r"pip install 'llama-guard-service\[peers\]'"):
        needed("no_such_library", "peers")
