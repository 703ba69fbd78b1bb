"""What a model answers where verdicts are read, and how far two models' answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from guard_quantization.checkpoint.importance import Batch

READS = (4, 1)  # places from a row's end: behind the closing, and behind `unsafe`, newline, `S`


_BEGINNING = 24  # tokens; by then a prompt has said which side is judged
_LEAST_SHARED = 8  # tokens that it pays to compute once


def read_states(
    model: LlamaForCausalLM, ids: Tensor, lengths: Tensor, share: bool = False
) -> Tensor:
    """States [rows, READS, hidden] in front of the output layer, of right-padded ids [rows, L].

    With `share`, what all rows begin with is computed once: less work for the rows of one
    direction, twice the passes over the weights.
    """
    at = lengths[:, None] - torch.tensor(READS, device=lengths.device)
    common = int((ids == ids[0]).all(0).cumprod(0).sum())
    common = min(common, int(at.min())) if share and len(ids) > 1 else 0
    if common < _LEAST_SHARED:
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
    past = DynamicCache()
    model.model(input_ids=ids[:1, :common], past_key_values=past, use_cache=True)
    past.batch_repeat_interleave(len(ids))
    found = model.model(input_ids=ids[:, common:], past_key_values=past, use_cache=True)
    states = found.last_hidden_state
    return states.gather(1, (at - common)[..., None].expand(-1, -1, states.shape[-1]))


def alike(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the rows, those together that begin alike: such batches share the most."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(tuple(row[:_BEGINNING]), []).append(at)
    return list(groups.values())


@torch.no_grad()
def verdict_logits(
    model: LlamaForCausalLM,
    head: Tensor,
    rows: Sequence[Batch],
    done: Callable[[int], None] = lambda count: None,
    share: bool = False,
) -> Tensor:
    """Logits [rows, reads, head] of the output rows `head` [head, hidden], in the rows' order.

    `share`: see `read_states`.
    """
    total = sum(len(batch.rows) for batch in rows)
    found = torch.empty(total, len(READS), len(head))
    for count, batch in enumerate(rows, 1):
        picked = read_states(model, batch.ids, batch.lengths, share)
        found[list(batch.rows)] = (picked @ head.T).float()
        done(count)
    return found


def agreement(reference: Tensor, found: Tensor) -> dict[str, float]:
    """How far verdict logits [rows, reads, head] are from the reference's.

    The head begins with `safe` and `unsafe`, as `quantize.verdict_tokens` has it. Mean |difference|
    of P(unsafe) between those two; share of rows on the same side of one half; mean
    Kullback-Leibler divergence from the reference, over the whole head, at all reads.
    """
    p, q = (logits[:, 0, :2].double().softmax(-1)[:, 1] for logits in (reference, found))
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (reference, found))
    return {
        "p_unsafe_difference": (p - q).abs().mean().item(),
        "verdict_agreement": ((p >= 0.5) == (q >= 0.5)).double().mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
    }
