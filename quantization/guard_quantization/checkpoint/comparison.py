"""What a model answers where verdicts are read, and how far two models' answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from guard_quantization.checkpoint.importance import Batch

READS = (4, 1)  # places from a row's end: behind the closing, and behind `unsafe`, newline, `S`


@torch.no_grad()
def verdict_logits(
    model: LlamaForCausalLM,
    head: Tensor,
    rows: Sequence[Batch],
    done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Logits [rows, reads, head] of the output rows `head` [head, hidden], in the rows' order."""
    total = sum(len(batch.rows) for batch in rows)
    found = torch.empty(total, len(READS), len(head))
    for count, batch in enumerate(rows, 1):
        states = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        at = batch.lengths[:, None] - torch.tensor(READS)
        picked = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
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
