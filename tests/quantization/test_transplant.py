"""An encoder written anew as a decoder: what should be kept is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel

from guard_quantization.llama import GuardLlama, LlamaShape
from guard_quantization.transplant import token_streams, transplant

WIDTH, MLP, VOCAB = 64, 128, 200


@pytest.fixture(scope="module")
def encoder() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=MLP,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = BertModel(config).eval()
    with torch.no_grad():  # as after training: norms with a scale and a shift, biases, strong heads
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.uniform_(0.5, 0.9)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.1)
            elif "embeddings" not in name:
                parameter.normal_(0, 0.12)
        model.embeddings.position_embeddings.weight.zero_()
    return model


def run(encoder: BertModel, mlp: int, ids: Tensor) -> Tensor:
    """The decoder's states, read as the encoder's, without causal mask and rotation."""
    shape = LlamaShape(VOCAB, WIDTH, mlp, 3, 4, 4, head_dim=16, rope_theta=1e6)
    state = transplant(encoder, ids, torch.ones_like(ids), shape)
    readout = state.pop("readout")
    decoder = GuardLlama(shape, 2)
    words = encoder.embeddings.word_embeddings.weight
    state["model.embed_tokens.weight"] = token_streams(encoder, words).detach()
    assert decoder.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool)
    x = decoder.model["embed_tokens"](ids)
    still = torch.ones(length, 8), torch.zeros(length, 8)
    for block in decoder.model["layers"]:  # type: ignore[attr-defined]
        x, _ = block(x, *still, seen, None)
    return F.rms_norm(x, (WIDTH,)) @ readout.T


@torch.inference_mode()
def test_the_decoder_computes_what_the_encoder_does_when_it_sees_the_same(
    encoder: BertModel,
) -> None:
    ids = torch.randint(0, VOCAB, (64, 20), generator=torch.Generator().manual_seed(1))
    wanted = encoder(ids).last_hidden_state
    centre = wanted.mean((0, 1))
    found = F.cosine_similarity(run(encoder, MLP, ids) - centre, wanted - centre, dim=-1).mean()
    assert found > 0.9
    pruned = F.cosine_similarity(run(encoder, 96, ids) - centre, wanted - centre, dim=-1).mean()
    assert 0.6 < pruned < found


@torch.inference_mode()
def test_embeddings_are_zero_mean_streams_with_a_constant_channel(encoder: BertModel) -> None:
    rows = token_streams(encoder, encoder.embeddings.word_embeddings.weight)
    assert torch.equal(rows[:, -1], torch.ones(VOCAB))
    norms = rows[:, :-1].norm(dim=1)
    assert torch.allclose(norms, torch.full((VOCAB,), WIDTH**0.5), rtol=0.02)
