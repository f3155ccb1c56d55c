"""Model shapes the benchmarks run on. Weights are random: a step takes the same time, and nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

#: Published shapes: https://huggingface.co/HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B,
#: meta-llama/Llama-3.1-8B and -70B
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "small": dict(  # for tests of the benchmarks; nobody publishes it
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16384,
        tie_word_embeddings=True,
    ),
    "llama-1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama-70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}


def config_of(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformers config of the model ``name``, a key of SHAPES."""
    from transformers import LlamaConfig

    return LlamaConfig(use_cache=False, max_position_embeddings=8192, dtype=dtype, **SHAPES[name])


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Module:
    """The model ``name`` with random weights (a key of SHAPES), or one loaded from the directory ``name``."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config_of(name, dtype))
    finally:
        torch.set_default_dtype(before)
