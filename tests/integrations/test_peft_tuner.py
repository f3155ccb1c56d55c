"""What the S²FT layers and the tuner do under PEFT: selection, quantized bases, partial backpropagation, refusals."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from comparing import assert_close, assert_equal, assert_series
from families import BY_NAME, eval_logits, llama, text_batch
from oracle import deltas_of
from torch import nn

import inlay
from inlay.bases import QuantizedLinear
from inlay.nn.partial import stops_backprop

peft = pytest.importorskip("peft")
integration = pytest.importorskip("inlay.integrations.peft")
from peft import PeftModel, get_peft_model  # noqa: E402
from peft_models import deep_llama, layers_of, quantized, randomize, train, trained, wrapped  # noqa: E402

from inlay.integrations.peft import S2FTConfig, internals  # noqa: E402
from inlay.integrations.peft.layer import S2FTQuantizedLinear  # noqa: E402

STEPS = 4


# --- selection ------------------------------------------------------------------------------------------

CALIBRATION = [text_batch(seed) for seed in range(2)]


@pytest.mark.parametrize("strategy", ["weight", "activation", "product", "gradient"])
def test_strategies_choose_what_tune_chooses(strategy, tmp_path):
    ours = inlay.tune(llama(), inlay.S2FT(ratio=0.2, strategy=strategy), calibration=CALIBRATION)
    model = trained(strategy=strategy, calibration=CALIBRATION)
    for path, delta in deltas_of(ours).items():
        assert_equal(layers_of(model)[path].s2ft_indices["default"], delta.s2ft_indices, path)
    model.save_pretrained(tmp_path)  # without the data
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(7)), eval_logits(model, text_batch(7)), "logits")


def test_a_second_adapter_is_chosen_by_the_base():
    model = wrapped()
    randomize(model)
    model.add_adapter("second", S2FTConfig(ratio=0.2, strategy="gradient", calibration=CALIBRATION))
    ours = inlay.tune(llama(), inlay.S2FT(ratio=0.2, strategy="gradient"), calibration=CALIBRATION)
    for path, delta in deltas_of(ours).items():
        assert_equal(layers_of(model)[path].s2ft_indices["second"], delta.s2ft_indices, path)


def test_missing_calibration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="calibration"):
        wrapped(strategy="activation")
    trained(strategy="activation", calibration=CALIBRATION).save_pretrained(tmp_path)
    model = get_peft_model(llama(), S2FTConfig.from_pretrained(tmp_path))  # the config without its channels
    with pytest.raises(RuntimeError, match="calibration"):
        model(**text_batch(0))


# --- quantized bases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_on_a_quantized_base(base, tmp_path):
    ours = inlay.tune(llama(), inlay.S2FT(ratio=0.2), base=base)
    model = wrapped(quantized(base))
    assert {type(layer) for layer in layers_of(model).values()} == {S2FTQuantizedLinear}
    batches = [text_batch(seed) for seed in range(STEPS)]
    assert_series(train(model, batches), train(ours, batches), rtol=2e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(base), tmp_path)
    wanted = eval_logits(model, text_batch(7))
    assert_equal(eval_logits(loaded, text_batch(7)), wanted, "loaded")
    with pytest.raises(ValueError, match="rounded away"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="quantization error"):
        merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(merged.model.layers[0].mlp.up_proj) is QuantizedLinear
    assert_close(eval_logits(merged, text_batch(7)), wanted, atol=1e-4)


def bitsandbytes_llama(bnb):
    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to("cpu"))
    return model


def test_on_a_model_that_bitsandbytes_quantized():
    bnb = pytest.importorskip("bitsandbytes")
    model, ours = wrapped(bitsandbytes_llama(bnb)), inlay.tune(bitsandbytes_llama(bnb), inlay.S2FT(ratio=0.2))
    assert {type(layer) for layer in layers_of(model).values()} == {S2FTQuantizedLinear}
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    batches = [text_batch(seed) for seed in range(STEPS)]
    assert_series(train(model, batches), train(ours, batches), rtol=2e-5)


def test_unloading_from_a_quantized_base():
    model = wrapped(quantized())
    randomize(model)
    plain = model.unload()
    assert type(plain.model.layers[0].mlp.down_proj) is QuantizedLinear
    assert_equal(eval_logits(plain, text_batch(0)), eval_logits(quantized(), text_batch(0)), "logits")
    with pytest.raises(AttributeError, match="stored quantized"):
        plain.model.layers[0].mlp.down_proj.weight = torch.zeros(1)


# --- partial backpropagation ----------------------------------------------------------------------------


def count_calls(model) -> list[int]:
    """How often each block runs: once forward, once more if it is recomputed."""
    calls = [0] * len(model.model.layers)

    def counter(index):
        return lambda *_: calls.__setitem__(index, calls[index] + 1)

    for index, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_hook(counter(index))
    return calls


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers, wanted", [([2], [1, 1, 2]), ([1], [1, 2, 2]), (None, [2, 2, 2])])
def test_checkpointing_recomputes_trained_layers_and_above_only(layers, wanted, reentrant):
    model = wrapped(deep_llama(), layers_to_transform=layers)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = count_calls(model.get_base_model())
    model(**text_batch(0)).loss.backward()
    assert calls == wanted
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def stopping_at(model):
    return [i for i, block in enumerate(model.get_base_model().model.layers) if stops_backprop(block)]


def test_the_stop_moves_with_the_active_adapter():
    model = wrapped(deep_llama(), layers_to_transform=[2])
    model.add_adapter("low", S2FTConfig(layers_to_transform=[0, 2]))
    assert stopping_at(model) == [2]
    model.set_adapter("low")
    assert stopping_at(model) == [0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_unfrozen_later_gets_its_gradient(reentrant):
    model = wrapped(deep_llama(), layers_to_transform=[2])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(True)
    model(**text_batch(0)).loss.backward()
    assert bool(embedding.weight.grad.any())


def test_activations_kept_are_those_of_tune():
    """The wrapper does not bring back what the fused blocks got rid of."""

    def kept(model):
        held = {}
        frozen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in frozen:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        batch = {k: v for k, v in text_batch(0).items() if k != "labels"}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch)
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    ours = inlay.tune(llama(), inlay.S2FT(ratio=0.2), fused_loss=False)
    assert kept(wrapped()) <= kept(ours)
    assert kept(wrapped(fused_blocks=False)) > 1.2 * kept(ours)


def test_ddp_sends_no_indices_and_no_packed_weights():
    """What DDP finds on the model it is given, under the names it sees there."""
    model = wrapped(quantized())
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert ignored <= names
    kept = {name for name in names - ignored if "packed" in name or "absmax" in name or "indices" in name}
    assert not kept and len(ignored) == 4 + 14 * 2
    assert not hasattr(model.unload(), "_ddp_params_and_buffers_to_ignore")


def test_compiles_without_a_graph_break():
    model = wrapped()
    randomize(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(**text_batch(0)).loss, model(**text_batch(0)).loss, atol=1e-6)


# --- errors and registration ----------------------------------------------------------------------------


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ValueError, match="wanted an nn.Linear or Conv1D, got Embedding"):
        wrapped(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="tuned by inlay.tune already"):
        wrapped(inlay.tune(llama(), inlay.S2FT()))
    with pytest.raises(ValueError, match="ratio: 'gate_proj' is no tuned linear"):
        wrapped(ratio={"gate_proj": 0.1}, target_modules=["down_proj"])
    with pytest.raises(ValueError, match="shared with"):
        wrapped(BY_NAME["gemma"].build(), target_modules=["lm_head"])


def test_importing_inlay_imports_no_peft():
    subprocess.run([sys.executable, "-c", "import sys, inlay; assert 'peft' not in sys.modules"], check=True)


@pytest.mark.parametrize("missing, message", [("peft", "pip install peft"), ("peft.mapping", "written for PEFT 0.21")])
def test_what_cannot_be_imported_is_named(missing, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "inlay.integrations.peft.internals")
    with pytest.raises(ImportError, match=message):
        importlib.import_module("inlay.integrations.peft.internals")


def test_registration_is_idempotent_and_never_takes_a_name_from_another():
    tables = internals.PEFT_TYPE_TO_CONFIG_MAPPING, internals.PEFT_TYPE_TO_TUNER_MAPPING
    before = [dict(table) for table in tables]
    internals.register(internals.TypeName("S2FT"), S2FTConfig, integration.S2FTModel)
    assert [dict(table) for table in tables] == before
    with pytest.raises(RuntimeError, match="'LORA' already"):
        internals.register(internals.TypeName("LORA"), S2FTConfig, integration.S2FTModel)


def test_moved_internals_are_named():
    class BaseTuner:
        inject_adapter = None

    internals.check_internals()
    with pytest.raises(RuntimeError, match=rf"written for PEFT 0.21, got PEFT {peft.__version__}.*no _prepare_model"):
        internals.check_internals(((BaseTuner, ("inject_adapter", "_prepare_model")),))
