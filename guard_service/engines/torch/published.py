"""What config.json of the published Llama Guard 3 models says of their sizes.

1B: as Meta's folder has it; unlike Llama 3.2 1B, embedding and output layer are not tied, and the
rope factor is 8. 8B: Meta's list of models; its rope scaling is taken to be the 1B's. 11B Vision:
the Llama 3.2 11B Vision architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOKENS: Mapping[str, Any] = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "vocab_size": 128256,
}
_ROPE: Mapping[str, Any] = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_TEXT: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": _ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    **_TOKENS,
}
_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "pretraining_tp": 1,
}

LLAMA_GUARD_3_1B: Mapping[str, Any] = {
    **_LLAMA,
    **_TEXT,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
}
LLAMA_GUARD_3_8B: Mapping[str, Any] = {
    **_LLAMA,
    **_TEXT,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
}
LLAMA_GUARD_3_11B_VISION: Mapping[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "text_config": {
        **_TEXT,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "model_type": "mllama_text_model",
        "num_hidden_layers": 40,
    },
    "vision_config": {
        "attention_heads": 16,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 560,
        "initializer_range": 0.02,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [
            *([1, wide] for wide in (1, 2, 3, 4)),
            *([2, high] for high in (1, 2)),
            *([3, 1], [4, 1]),
        ],
        "vision_output_dim": 7680,
    },
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "1b": LLAMA_GUARD_3_1B,
    "8b": LLAMA_GUARD_3_8B,
    "11b-vision": LLAMA_GUARD_3_11B_VISION,
}
