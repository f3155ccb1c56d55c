"""Every architecture the installed transformers has and a small config builds: nothing differs, nothing crashes."""

from __future__ import annotations

import pytest
import transformers

from census.examine import examine
from census.tiny import model_types

#: What most people fine-tune, and those that once were wrong.
COMMON = [
    "afmoe",
    "albert",
    "bamba",
    "bert",
    "bloom",
    "cohere2",
    "deepseek_v3",
    "deepseek_v4",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoehybrid",
    "helium",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "mistral",
    "mixtral",
    "modernbert",
    "nemotron_h",
    "olmo",
    "olmo2",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "smollm3",
    "stablelm",
    "starcoder2",
    "t5",
    "vit",
    "wav2vec2",
    "wavlm",
    "zamba2",
]
REST = sorted(set(model_types()) - set(COMMON))


def check(model_type: str) -> bool:
    """False where no tiny model of it runs by itself, in plain transformers."""
    transformers.logging.set_verbosity_error()
    try:
        found = examine(model_type)
    except Exception:
        return False
    assert not found.faults, found
    return True


@pytest.mark.parametrize("model_type", COMMON)
def test_common_architectures(model_type):
    if not check(model_type):
        pytest.skip("its tiny model does not run by itself")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_other_architectures(part):
    ran = [model_type for model_type in REST[part::8] if check(model_type)]
    print(f"{len(ran)} of {len(REST[part::8])} architectures")
    assert len(ran) >= 12, ran  # over a hundred in all parts together
