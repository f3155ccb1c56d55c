"""S2FT equals masked full fine-tuning, on every family, in both forms."""

from __future__ import annotations

import copy

import pytest
import torch
from families import BY_NAME, FAMILIES, cast
from oracle import assert_equals_masked

import inlay

STEPS, LEARNING_RATE = 5, 3e-3

#: In-place decay pulls the trained entries towards zero, as full fine-tuning does; additive decay towards the base.
FORMS = [("additive", 0.0), ("in_place", 0.1)]

#: Ways to say what to tune, on Llama: (id, options of S2FT).
CHOICES = {
    "output channels": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        "ratio": 0.2,
        "granularity": 1,
    },
    "all linears": {"target_modules": "all-linear", "ratio": 0.15},
    "a ratio per target": {"ratio": {"o_proj": 0.5, "down_proj": 0.1}},
    "a count": {"channels": 3, "granularity": 1},
    "a count per target": {"channels": {"o_proj": 8, "down_proj": 5}},
    "groups": {"granularity": {"o_proj": 4, "down_proj": 6}, "ratio": 0.3},
    "other sides": {"side": {"o_proj": "out", "down_proj": "out"}, "granularity": 1, "ratio": 0.2},
    "input sides of all": {"target_modules": "all-linear", "side": "in", "granularity": 1, "ratio": 0.2},
    "every channel": {"ratio": 1.0},
    "one layer": {"layers_to_transform": [1], "ratio": 0.2},
    "the output head": {"target_modules": ["lm_head"], "ratio": 0.1},
    "a pattern": {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj", "ratio": 0.2},
}


def run(family, options, update, decay, *, dtype=torch.float32, tolerance=1e-5, pull=0.0, fused=True):
    eager = family.build().to(dtype)
    tuned = inlay.tune(copy.deepcopy(eager), inlay.S2FT(update=update, **options), fused_blocks=fused, fused_loss=fused)
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    adamw = inlay.optim.AdamW if dtype is torch.float32 else torch.optim.AdamW
    optimizer = adamw(trainable, lr=LEARNING_RATE, weight_decay=pull or decay)
    batches = [cast(family.batch(seed), dtype) for seed in range(STEPS)]
    assert_equals_masked(
        tuned, eager, batches, optimizer, tolerance=tolerance, lr=LEARNING_RATE, weight_decay=decay, pull=pull
    )


@pytest.mark.parametrize("update, decay", FORMS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family(family, update, decay):
    run(family, {"ratio": 0.2}, update, decay)


@pytest.mark.parametrize("update, decay", FORMS)
@pytest.mark.parametrize("family", ["opt", "bert", "vit"])
def test_in_float64(family, update, decay):
    """Where rounding is no excuse. The other families' own code goes through fp32: norms, rotary angles."""
    run(BY_NAME[family], {"ratio": 0.2}, update, decay, dtype=torch.float64, tolerance=1e-10, fused=False)


@pytest.mark.parametrize("update, decay", FORMS)
@pytest.mark.parametrize("choice", CHOICES)
def test_choice_of_channels(choice, update, decay):
    run(BY_NAME["llama"], CHOICES[choice], update, decay)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize("update, decay", FORMS)
def test_all_linears_of_other_families(family, update, decay):
    run(BY_NAME[family], {"target_modules": "all-linear", "ratio": 0.1, "granularity": 1}, update, decay)


@pytest.mark.parametrize("update, decay", FORMS)
def test_without_fused_modules(update, decay):
    run(BY_NAME["llama"], {"ratio": 0.2}, update, decay, fused=False)


def test_additive_decay_pulls_towards_the_base():
    run(BY_NAME["llama"], {"ratio": 0.2}, "additive", 0.0, pull=0.3)


def test_the_oracle_notices_weight_decay():
    """Additive with decay is not masked full fine-tuning with decay: the comparison above can fail."""
    with pytest.raises(AssertionError, match="losses: . of 5"):
        run(BY_NAME["llama"], {"ratio": 0.2}, "additive", 0.3, tolerance=1e-5)
