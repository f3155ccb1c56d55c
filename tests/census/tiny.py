"""Tiny random models of every architecture that the installed transformers has and a small config can build.

No list of classes is kept: a config's default is made small by the names its options have in common with all others.
What then cannot be built or run alone (it wants a package, an image pyramid, another model's output) is left out, with
the reason.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, TOKENS, ROWS = 96, 7, 2
LARGEST = 5_000_000

#: Options by their whole name, as a regular expression, and the value a tiny model gets; the first match counts.
SMALL: tuple[tuple[str, Any], ...] = (
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
    (r"(num_)?(hidden_layers|layers|encoder_layers|decoder_layers|decoder_hidden_layers)|n_layers?|depth", 2),
    (r"vocab_size|text_vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"(text_)?(hidden_size|d_model|n_embd|embed_dim|dim|word_embed_proj_dim|embedding_size|hidden_dim)", 32),
    (r"moe_intermediate_size|shared_expert_intermediate_size|moe_shared_expert_intermediate_size", 24),
    (r"intermediate_size|ffn_dim|n_inner|d_ff|d_inner|ffn_hidden_size|(encoder|decoder)_ffn_dim|dff", 48),
    (
        r"num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_query_groups|num_global_key_value_heads",
        2,
    ),
    (r"(num_)?(attention_heads|heads|encoder_attention_heads|decoder_attention_heads)|n_heads?", 4),
    (r"num_key_heads|linear_num_key_heads|num_linear_key_value_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"(global_)?head_dim|attention_head_dim|d_kv|linear_(key|value)_head_dim|v_head_dim|qk_nope_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim|qk_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|index_head_dim", 16),
    (r"(num_)?(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_expert|n_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_selected_experts|moe_top_k|num_experts_per_token", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"mamba_(n_heads|num_heads)|mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"mamba_d_ssm", 64),
    (r"chunk_size|mamba_chunk_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length", 64),
    (r"hidden_size_per_layer_input", 8),
    (r"image_size", 8),
    (r"patch_size", 4),
    (r"(num_)?(mel_bins)", 16),
    (r"mask_(time|feature)_prob", 0.0),
    (r".*(dropout|_pdrop|dropout_prob|dropout_rate|layerdrop|drop_path_rate).*", 0.0),
)
#: Options whose default a smaller model contradicts: dropped, so that the config works them out again.
_DERIVED = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "hybrid_override_pattern",
    "no_rope_layers",
    "rope_parameters",
)


def _shrink(config: Any, depth: int = 0) -> dict[str, Any]:
    """Options of a small config of the kind of ``config``, nested ones included."""
    accepted = set(inspect.signature(type(config).__init__).parameters) | set(vars(config))
    options: dict[str, Any] = {}
    for name in sorted(accepted):
        held = getattr(config, name, None)
        if isinstance(held, hf.PreTrainedConfig) and depth < 3:
            options[name] = {**_shrink(held, depth + 1), "model_type": held.model_type}
        elif isinstance(held, bool) or not isinstance(held, int | float):
            continue
        else:
            small = next((value for pattern, value in SMALL if re.fullmatch(pattern, name)), None)
            if small is not None and (isinstance(small, float) or small < held):
                options[name] = type(held)(small)
    if {"state_size", "num_heads", "head_dim"} <= set(options):  # state spaces of twice the hidden size
        options["head_dim"] = 16
    if "qk_rope_head_dim" in options:  # latent attention: the other widths follow, and keys have all heads
        options = {name: value for name, value in options.items() if name not in ("head_dim", "qk_head_dim")}
        options |= {"num_key_value_heads": 4} if "num_key_value_heads" in options else {}
    return options


@cache
def small_config(model_type: str) -> Any:
    """The config of a tiny model of ``model_type``; raises what building it raises."""
    kind = CONFIG_MAPPING[model_type]
    options = _shrink(kind())
    for id_name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(kind(), id_name, None), int):
            options[id_name] = 1
    try:
        return kind(**options)
    except Exception:  # some want a layer's type for each layer, and have no default of another depth
        layers = next(v for k, v in options.items() if re.fullmatch(SMALL[1][0], k))
        held = kind()
        lists = {
            name: list(getattr(held, name))[:layers] for name in _DERIVED if isinstance(getattr(held, name, None), list)
        }
        return kind(**options, **lists)


#: What to build of a config, the first that exists.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForImageTextToText",
    "AutoModel",
)


def tiny_model(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of random weights in eval mode, and arguments of its forward; always the same ones for a seed."""
    torch.manual_seed(seed)
    config = small_config(model_type)
    reason: Exception | None = None
    for name in _AUTO:
        auto = getattr(hf, name)
        if type(config) not in auto._model_mapping:
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                _check_size(auto, config)
                model = auto.from_config(config).float()
            model.config.get_text_config().use_cache = False  # of layers that keep states, two have no cache in common
            _perturb(model)
            inputs = inputs_of(model)
            _check_it_runs(model, inputs)
            return model.eval(), inputs
        except Exception as error:
            reason = error
    raise reason or ValueError(f"no automatic class builds {model_type}")


def _check_size(auto: Any, config: Any) -> None:
    with torch.device("meta"):
        try:
            count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        except Exception:
            return  # some cannot be built there
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters: its config has sizes under names of its own")


def _check_it_runs(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Forward and backward in both modes, on a copy: some keep statistics or states of what they saw."""
    for mode in (True, False):
        out = first_tensor(copy.deepcopy(model).train(mode)(**inputs))
        if not bool(torch.isfinite(out).all()):
            raise ValueError("its random weights give numbers that are not finite")
        out.sum().backward()


def _perturb(model: nn.Module) -> None:
    """Zeros and ones of a fresh model hide what a norm's weight or a bias does."""
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                size = 0.05 if parameter.dim() > 1 else 0.1
                parameter.add_(size * torch.randn(parameter.shape, generator=random))


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Arguments of a forward: tokens with labels where it takes them, else an image or a sound."""
    random = torch.Generator().manual_seed(5)
    takes = inspect.signature(type(model).forward).parameters
    config, text = model.config, model.config.get_text_config()
    found: dict[str, Tensor] = {}
    if "input_ids" in takes:
        high = min(getattr(text, "vocab_size", VOCABULARY) or VOCABULARY, VOCABULARY)
        found["input_ids"] = torch.randint(2, high, (ROWS, TOKENS), generator=random)
        if "attention_mask" in takes:
            found["attention_mask"] = torch.ones(ROWS, TOKENS, dtype=torch.long)
        if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = torch.randint(2, high, (ROWS, TOKENS), generator=random)
    elif "pixel_values" in takes:
        size = getattr(config, "image_size", 8)
        if not isinstance(size, int):
            raise ValueError(f"wants images of {size}")
        found["pixel_values"] = torch.randn(ROWS, getattr(config, "num_channels", 3), size, size, generator=random)
    elif "input_values" in takes:
        found["input_values"] = torch.randn(ROWS, 1600, generator=random)
    else:
        raise ValueError(f"no input is known for {sorted(takes)[:6]}")
    return found


def first_tensor(output: Any) -> Tensor:
    """The main output: logits, or the last hidden state."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise ValueError(f"no tensor in {type(output).__name__}")


def model_types() -> Iterator[str]:
    """Every model type, causal language models first."""
    causal = [name for name in CONFIG_MAPPING if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    yield from causal
    yield from (name for name in CONFIG_MAPPING if name not in causal)
