"""The backward stop never cuts a gradient that somebody wants, in whatever order and however often blocks run.

Oracle: full autograd on an untouched, eager copy of the model, without checkpointing.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from comparing import assert_close
from families import VOCABULARY, image_batch, llama, perturb, text_batch
from oracle import deltas_of, trained_entries
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

import inlay

MODES = {"plain": None, "reentrant": True, "not reentrant": False}
_SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return MODES[request.param]


pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def token_batch(tokens=11):
    return {"input_ids": text_batch(0, tokens=tokens)["input_ids"], "labels": text_batch(1, tokens=tokens)["input_ids"]}


def checkpoint(model, mode):
    if mode is not None:
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode})
        model.enable_input_require_grads()  # what Trainer does along with it
    return model


def full_gradients(model, batch):
    """Loss and all gradients of an eager model."""
    model.requires_grad_(True)
    loss = model(**batch).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_as_autograd_says(tuned, eager, batch, tolerance=1e-5):
    """Every delta's gradient is the full gradient at its entries."""
    wanted_loss, wanted = full_gradients(eager, batch)
    loss = tuned(**batch).loss
    loss.backward()
    assert_close(loss, wanted_loss, atol=1e-5, what="loss")
    assert deltas_of(tuned)
    for path, delta in deltas_of(tuned).items():
        full = trained_entries(tuned, path, wanted[f"{path}.weight"])
        assert bool(full.any()), f"{path}: the oracle has no gradient, which would prove nothing"
        assert delta.s2ft_values.grad is not None, f"{path} lost its gradient"
        assert_close(delta.s2ft_values.grad, full, atol=tolerance * float(full.abs().max()), what=path)


# --- blocks that run more than once, or in another order than their list's -------------------------------------------


class Plan(hf.PretrainedConfig):
    """``steps``: blocks in the order they run; a pair ``[block, step]`` also adds what came out of an earlier step."""

    model_type = "plan"

    def __init__(self, steps=(0, 1), blocks=3, by_name=False, **kwargs):
        super().__init__(**kwargs)
        self.steps, self.blocks, self.by_name = steps, blocks, by_name


class Block(GradientCheckpointingLayer):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, hidden_states, skip=None):
        skip = 0 if skip is None else skip
        return hidden_states + self.down(torch.tanh(self.up(self.norm(hidden_states + skip))))


class Planned(hf.PreTrainedModel):
    config_class = Plan
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(config.blocks))
        self.head = nn.Linear(16, VOCABULARY)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        outs = []
        for step in self.config.steps:
            block, skip = (step, None) if isinstance(step, int) else (step[0], outs[step[1]])
            if self.config.by_name:
                hidden = self.blocks[block](hidden_states=hidden, skip=skip)
            else:
                hidden = self.blocks[block](hidden, skip)
            outs.append(hidden)
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss)


def planned(*steps, **options):
    return perturb(Planned(Plan(steps=steps, **options)))


def albert(groups, layers, inner=1):
    config = hf.AlbertConfig(
        embedding_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        inner_group_num=inner,
        **_SMALL,
        **_NO_DROPOUT,
    )
    return perturb(hf.AlbertForMaskedLM(config))


ALBERT = ["query", "ffn", "ffn_output"]
REPEATED = {
    "albert 1x3": (lambda: albert(1, 3), ALBERT),
    "albert 2x4": (lambda: albert(2, 4), ALBERT),
    "albert second group": (lambda: albert(2, 4), r".*groups\.1\..*\.(query|ffn)"),
    "albert inner": (lambda: albert(1, 2, inner=2), r".*albert_layers\.1\..*\.(query|value)"),
    "looped": (lambda: planned(0, 1, 2, 0, 1, 2), ["up", "down"]),
    "looped, one trained": (lambda: planned(0, 1, 2, 0, 1, 2), r"blocks\.1\.(up|down)"),
    "one block again and again": (lambda: planned(0, 1, 1, 1, 2), r"blocks\.1\.up"),
    "reversed": (lambda: planned(2, 1, 0), ["up", "down"]),
    "reversed, two trained": (lambda: planned(2, 1, 0), r"blocks\.[02]\.(up|down)"),
    "U-shaped": (lambda: planned(0, 1, 2, [3, 1], [4, 0], blocks=5), r"blocks\.[134]\.(up|down)"),
    "skips around a frozen block": (lambda: planned(0, 1, [2, 0]), r"blocks\.[02]\.up"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_and_reordered_blocks(name, mode):
    build, targets = REPEATED[name]
    tuned = inlay.tune(build(), inlay.S2FT(ratio=0.3, target_modules=targets))
    assert_trains_as_autograd_says(checkpoint(tuned, mode), build(), token_batch())


@pytest.mark.parametrize("mode", [None, False], ids=str)
def test_hidden_states_by_name(mode):
    build = lambda: planned(0, 1, 2, 0, by_name=True)  # noqa: E731
    tuned = inlay.tune(build(), inlay.S2FT(ratio=0.3, target_modules=r"blocks\.1\..*"))
    assert_trains_as_autograd_says(checkpoint(tuned, mode), build(), token_batch())


def test_a_reentrant_checkpoint_of_named_hidden_states_is_an_error():
    """torch would record nothing, and no weight would train."""
    tuned = inlay.tune(planned(0, 1, by_name=True), inlay.S2FT(target_modules=["up"]))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        checkpoint(tuned, True)(**text_batch(0))


def perceiver():
    config = hf.PerceiverConfig(
        num_latents=5,
        d_latents=16,
        d_model=16,
        num_blocks=3,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=16,
        v_channels=16,
        attention_probs_dropout_prob=0.0,
        **_SMALL,
    )
    return perturb(hf.PerceiverForMaskedLM(config))


def test_perceiver_runs_its_blocks_several_times():
    method = inlay.S2FT(ratio=0.3, target_modules=r".*self_attends\..*(query|dense1)")
    tuned = inlay.tune(perceiver(), method)
    tuned.enable_input_require_grads()
    assert_trains_as_autograd_says(tuned, perceiver(), token_batch(64))


# --- gradients that somebody wants below the first trained block -----------------------------------------------------

LAST = inlay.S2FT(ratio=0.2, layers_to_transform=[2])


def deep(**changes):
    return llama(num_hidden_layers=3, **changes)


def embeds_batch(model, requires_grad=True):
    batch = text_batch(0)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    return {"inputs_embeds": embeds.detach().clone().requires_grad_(requires_grad), **batch}


def gradient_of_embeds(model, batch):
    model(**batch).loss.backward()
    return batch["inputs_embeds"].grad


@pytest.mark.parametrize("through_backbone", [False, True])
@pytest.mark.parametrize("method", [LAST, inlay.S2FT(ratio=0.2), inlay.LoRA(r=2, layers_to_transform=[1])], ids=repr)
def test_inputs_embeds_get_the_base_models_gradient(method, mode, through_backbone):
    base, tuned = deep(), checkpoint(inlay.tune(deep(), method), mode)

    def gradient(model):
        batch = embeds_batch(model)
        if not through_backbone:
            return gradient_of_embeds(model, batch)
        batch.pop("labels")
        model.model(**batch).last_hidden_state.square().sum().backward()
        return batch["inputs_embeds"].grad

    wanted = gradient(base)
    assert_close(gradient(tuned), wanted, atol=1e-5 * float(wanted.abs().max()), what="inputs_embeds")


@pytest.mark.parametrize("detached", [True, False])
def test_the_embeddings_own_output_as_an_input(mode, detached):
    """What saliency methods do: with checkpointing its gradient has been asked for already, outside any forward."""
    base, tuned = deep(), checkpoint(inlay.tune(deep(), LAST), mode)
    wanted = gradient_of_embeds(base, embeds_batch(base))
    batch = text_batch(0)
    embeds = tuned.get_input_embeddings()(batch.pop("input_ids"))
    embeds = embeds.detach().requires_grad_(True) if detached else embeds.requires_grad_(True)
    tuned(**text_batch(0)).loss.backward()  # a forward in between changes nothing
    ours = gradient_of_embeds(tuned, {"inputs_embeds": embeds, **batch})
    assert_close(ours, wanted, atol=1e-5 * float(wanted.abs().max()), what="inputs_embeds")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_embeddings_output_as_an_input_after_a_forward_that_raised(error, mode):
    def fail(*args):
        raise error

    broken = inlay.tune(deep(), LAST)
    broken.model.layers[0].mlp.up_proj.register_forward_hook(fail)
    with pytest.raises(error):
        broken(**text_batch(0))
    tuned = checkpoint(inlay.tune(deep(), LAST), mode)
    handle = tuned.model.layers[0].mlp.up_proj.register_forward_hook(fail)
    with pytest.raises(error):
        tuned(**text_batch(0))
    handle.remove()
    batch = text_batch(0)
    embeds = tuned.get_input_embeddings()(batch.pop("input_ids")).requires_grad_(True)
    assert bool(gradient_of_embeds(tuned, {"inputs_embeds": embeds, **batch}).any())


def test_a_hook_of_the_users_on_the_embeddings(mode):
    base, tuned = deep(), checkpoint(inlay.tune(deep(), LAST), mode)
    wanted = gradient_of_embeds(base, embeds_batch(base))
    seen = []
    tuned.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_(True)))
    tuned(**text_batch(0)).loss.backward()
    assert_close(seen[0].grad, wanted, atol=1e-5 * float(wanted.abs().max()), what="embeddings' output")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("under_peft", [False, True])
def test_what_is_unfrozen_below_trains(name, under_peft, mode):
    _, wanted = full_gradients(deep(), text_batch(0))
    if under_peft:
        from peft import get_peft_model

        from inlay.integrations.peft import S2FTConfig

        tuned = get_peft_model(deep(), S2FTConfig(ratio=0.2, layers_to_transform=[2]))
        held = tuned.get_base_model().get_parameter(name)
    else:
        tuned = inlay.tune(deep(), LAST)
        held = tuned.get_parameter(name)
    checkpoint(tuned, mode)
    held.requires_grad_(True)
    tuned(**text_batch(0)).loss.backward()
    assert_close(held.grad, wanted[name], atol=1e-5 * float(wanted[name].abs().max()), what=name)


def test_inputs_added_between_blocks(mode):
    """As ControlNet or a steering vector does: something trained elsewhere, added to what enters a frozen block."""
    added = torch.randn(32, generator=torch.Generator().manual_seed(1)).requires_grad_(True)

    def gradient(model):
        added.grad = None
        model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.1 * added, *args[1:]))
        model(**text_batch(0)).loss.backward()
        return added.grad.clone()

    wanted = gradient(deep())
    ours = gradient(checkpoint(inlay.tune(deep(), LAST), mode))
    assert_close(ours, wanted, atol=1e-5 * float(wanted.abs().max()), what="added")


def llava():
    text = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **_SMALL,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)  # of what perturb adds to
    return perturb(
        hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=90))
    )


def picture_batch():
    batch = text_batch(0)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 90, 91)
    ids[:, 2:6] = 90  # four patches
    return batch | {"input_ids": ids, "pixel_values": image_batch(0)["pixel_values"]}


@pytest.mark.parametrize("vision", [False, True], ids=["projector", "projector and vision"])
def test_a_projector_below_a_tuned_language_model(vision, mode):
    _, wanted = full_gradients(llava(), picture_batch())
    targets = r".*language_model\.layers\.[12]\..*(q_proj|down_proj)" + (
        r"|.*vision.*layers\.0.*q_proj" if vision else ""
    )
    tuned = checkpoint(inlay.tune(llava(), inlay.LoRA(r=2, target_modules=targets)), mode)
    projector = {n: p for n, p in tuned.named_parameters() if "multi_modal_projector" in n}
    for parameter in projector.values():
        parameter.requires_grad_(True)
    tuned(**picture_batch()).loss.backward()
    for name, parameter in projector.items():
        assert_close(parameter.grad, wanted[name], atol=2e-5 * float(wanted[name].abs().max()), what=name)
    for path, delta in deltas_of(tuned).items():
        full = delta.scale * wanted[f"{path}.weight"] @ delta.lora_A.detach().t()  # B is zero
        assert_close(delta.lora_B.grad, full, atol=2e-5 * float(full.abs().max()), what=path)


def test_pictures_of_a_frozen_projector_record_nothing_below(mode):
    """No block runs twice below the first trained one."""
    tuned = checkpoint(
        inlay.tune(llava(), inlay.S2FT(target_modules=r".*language_model\.layers\.2\..*down_proj")), mode
    )
    layers, calls = tuned.model.language_model.layers, [0, 0, 0]
    for index, layer in enumerate(layers):
        layer.mlp.up_proj.register_forward_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    tuned(**picture_batch()).loss.backward()
    assert calls == [1, 1, 1 if mode is None else 2]


@pytest.mark.parametrize("family", ["t5 decoder", "t5 both"])
def test_an_encoders_frozen_blocks_are_not_recorded(family, mode):
    from families import BY_NAME

    targets = r"decoder\..*\.wo" if family == "t5 decoder" else r".*\.block\.1\..*\.wo"
    eager, tuned = (
        BY_NAME["t5"].build(),
        inlay.tune(BY_NAME["t5"].build(), inlay.S2FT(ratio=0.3, target_modules=targets)),
    )
    checkpoint(tuned, mode)
    seen = []
    tuned.encoder.block[0].register_forward_hook(lambda module, args, out: seen.append(out[0].requires_grad))
    assert_trains_as_autograd_says(tuned, eager, BY_NAME["t5"].batch(0))
    assert seen == [False]


# --- through PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["albert 1x3", "albert 2x4", "looped", "U-shaped"])
def test_repeated_blocks_under_peft(name, mode):
    from peft import get_peft_model

    from inlay.integrations.peft import S2FTConfig
    from inlay.integrations.peft.layer import S2FTLinear

    build, targets = REPEATED[name]
    _, wanted = full_gradients(build(), token_batch())
    model = get_peft_model(build(), S2FTConfig(ratio=0.3, target_modules=targets))
    checkpoint(model.get_base_model(), mode)
    model(**token_batch()).loss.backward()
    layers = {path: m for path, m in model.get_base_model().named_modules() if isinstance(m, S2FTLinear)}
    assert layers
    for path, layer in layers.items():
        delta = layer.s2ft_deltas["default"]
        full = wanted[f"{path}.weight"].index_select(delta.dim, delta.s2ft_indices)
        assert_close(delta.s2ft_values.grad, full, atol=1e-5 * float(full.abs().max()), what=path)


@pytest.mark.parametrize("name", ["albert 1x3", "albert 2x4", "looped"])
def test_repeated_blocks_under_accelerated_lora(name, mode):
    from peft import LoraConfig, get_peft_model

    from inlay.integrations.peft import accelerate_lora

    build, targets = REPEATED[name]
    _, wanted = full_gradients(build(), token_batch())
    model = get_peft_model(build(), accelerate_lora(LoraConfig(r=2, lora_alpha=4, target_modules=targets)))
    checkpoint(model.get_base_model(), mode)
    model(**token_batch()).loss.backward()
    layers = {p: m for p, m in model.get_base_model().named_modules() if hasattr(m, "lora_A") and hasattr(m, "factors")}
    assert layers
    for path, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        full = 2.0 * wanted[f"{path}.weight"] @ a.detach().t()
        assert_close(b.grad, full, atol=1e-5 * float(full.abs().max()), what=path)


def test_nothing_of_it_stays_on_a_merged_model():
    tuned = inlay.tune(deep(), LAST)
    plain = inlay.merge(copy.deepcopy(tuned))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()]
    assert sum(hooks) == 0 and type(plain.model.layers[0]) is type(deep().model.layers[0])
    assert len(tuned.get_input_embeddings()._forward_hooks) == 1
    tuned.set_adapter("default")
    assert len(tuned.get_input_embeddings()._forward_hooks) == 1
