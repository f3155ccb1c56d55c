"""Which models have a head of their own: every task class of the installed transformers does, no language model."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from families import llama
from torch import nn
from transformers.models.auto import modeling_auto

import inlay
from inlay.task_head import task_head

#: Answer with tokens of a language model: no head to train.
WITHOUT = {
    "BlipForQuestionAnswering",
    "Blip2ForConditionalGeneration",
    "ShieldGemma2ForImageClassification",
    "GraniteSpeech5ForCTC",  # its encoder feeds its own output back in
}
TASKS = "SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION QUESTION_ANSWERING MULTIPLE_CHOICE IMAGE_CLASSIFICATION "
TASKS += "AUDIO_CLASSIFICATION AUDIO_FRAME_CLASSIFICATION VIDEO_CLASSIFICATION CTC OBJECT_DETECTION "
TASKS += "SEMANTIC_SEGMENTATION TIME_SERIES_REGRESSION VISUAL_QUESTION_ANSWERING"


def models(mapping: str):
    """Every class of an auto mapping that its default config builds, two layers deep, on the meta device."""
    for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
        for name in (names,) if isinstance(names, str) else names:
            try:
                kind = getattr(transformers, name)
                config = kind.config_class()
                for depth in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"):
                    if isinstance(getattr(config, depth, None), int):
                        setattr(config, depth, 2)
                with torch.device("meta"):
                    yield name, kind(config)
            except Exception:  # needs another package, or a config of parts
                continue


def parameters(model: nn.Module, names: list[str]) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if any(n == h or n.startswith(f"{h}.") for h in names))


@pytest.mark.parametrize("mapping", TASKS.split())
def test_every_task_model_has_a_head(mapping):
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model in models(mapping):
            found[name] = task_head(model)
            if found[name]:
                assert parameters(model, found[name]) > 0, name
    assert {name for name, head in found.items() if not head} <= WITHOUT
    print(f"{mapping}: {len(found)} classes")
    assert len(found) >= 2


@pytest.mark.parametrize("mapping", ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"])
def test_no_language_model_has_one(mapping):
    found = {name: task_head(model) for name, model in models(mapping)}
    assert len(found) >= 20 and not any(found.values()), {k: v for k, v in found.items() if v}


def small(kind: str, **options):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    for name, value in options.items():
        setattr(config, name, value)
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize(
    "kind, head",
    [
        ("LlamaForSequenceClassification", "score"),
        ("LlamaForTokenClassification", "score"),
        ("LlamaForQuestionAnswering", "qa_outputs"),
    ],
)
def test_heads_of_llama(kind, head):
    tuned = inlay.tune(small(kind, num_labels=2), inlay.S2FT())
    assert tuned.inlay_state.methods["default"].modules_to_save == [head]
    assert tuned.get_submodule(head).weight.requires_grad


def test_a_class_of_ones_own_is_known_by_its_outputs():
    class Reward(transformers.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.LlamaModel(config)
            self.value = nn.Linear(32, 1)

    config = small("LlamaModel", num_labels=1).config
    assert task_head(Reward(config)) == ["value"]


def test_bare_and_foreign_models_have_none():
    assert task_head(small("LlamaModel")) == task_head(llama()) == task_head(nn.Sequential(nn.Linear(4, 2))) == []
