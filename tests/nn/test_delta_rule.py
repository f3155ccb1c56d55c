"""Linear attention by the gated delta rule: the module's own forward, with our op for transformers' loops."""

from __future__ import annotations

import copy
import pickle
import re
from types import SimpleNamespace

import methods
import pytest
import torch
import transformers
from census.tiny import first_tensor, small_config, tiny_model
from comparing import assert_close, assert_series
from families import BY_NAME, text_batch
from torch import nn
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import inlay
from inlay.nn import delta_rule
from inlay.nn.blocks import gated_norm_settings, install_blocks
from inlay.nn.delta_rule import FusedDeltaRule, computes_causal_conv1d, computes_gated_delta_rule
from inlay.nn.exchange import exchanged

#: Every modeling of the installed transformers that has the fallback, by a model type that builds it.
MODEL_TYPES = ("lara_mini", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text")
QWEN = BY_NAME["qwen3_5"]


def rules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedDeltaRule)]


def pair(model_type: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model, and one with fused blocks."""
    model, _ = tiny_model(model_type)
    return fused_too(model)


def with_attention(model_type: str) -> tuple[nn.Module, nn.Module]:
    """The same with a layer of each kind: a cache of linear attention alone does not know how long it is."""
    config = copy.deepcopy(small_config(model_type))
    config.layer_types = ["linear_attention", "full_attention"]
    torch.manual_seed(0)
    return fused_too(transformers.AutoModelForCausalLM.from_config(config).float().eval())


def fused_too(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    fused = copy.deepcopy(model)
    install_blocks(fused)
    assert rules(fused) and not rules(model)
    return model, fused


def everything(model: nn.Module, **inputs) -> dict[str, torch.Tensor]:
    """Logits, and gradients of every parameter."""
    model.zero_grad()
    model.requires_grad_(True)
    logits = first_tensor(model(**inputs))
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)))
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


#: What decays come from. In fp32 transformers' functions lose percents of these gradients, see below.
DECAYS = re.compile(r"dt_bias|A_log|in_proj_b?a\.|a_proj\.")


def assert_all_close(ours: dict, wanted: dict, exact: bool = False) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        size, loose = float(tensor.abs().max()), not exact and DECAYS.search(name)
        atol = 1e-5 + 6e-2 * size if loose else 1e-4 * max(size, 1e-2)
        assert_close(ours[name], tensor, atol=atol, what=name)


def tokens(count: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(2, 90, (rows, count), generator=torch.Generator().manual_seed(count))


def test_every_fallback_of_transformers_is_proven():
    """Those that a new release adds or changes show here."""
    found = {name for name in transformers.models.__all__ if "torch_chunk_gated_delta_rule" in (_source(name) or "")}
    assert found == {name.removesuffix("_text") for name in MODEL_TYPES}


def _source(name: str) -> str | None:
    from pathlib import Path

    file = Path(transformers.models.__path__[0]) / name / f"modeling_{name}.py"
    return file.read_text() if file.exists() else None


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("training", [True, False])
def test_same_logits_and_gradients(model_type, training):
    """One token, less than a chunk, and several chunks."""
    plain, fused = (model.train(training) for model in pair(model_type))
    for count in (1, 7, 64 if training else 150):
        ids = tokens(count)
        assert_all_close(everything(fused, input_ids=ids), everything(plain, input_ids=ids))


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid"])
@pytest.mark.parametrize("count", [7, 150])
def test_gradients_of_decays_are_those_of_float64(model_type, count, monkeypatch):
    """Those of the model's own loops are up to 40% off: they sum what cancels on the diagonal of a chunk."""
    plain, fused = pair(model_type)
    exact = copy.deepcopy(fused).double()
    ours, theirs = (everything(model, input_ids=tokens(count)) for model in (fused, plain))
    monkeypatch.setattr(delta_rule, "has_own_kernel", lambda query: True)  # the op's reference, in float64
    wanted = everything(exact, input_ids=tokens(count))
    assert_all_close(ours, wanted, exact=True)
    decays = [name for name in wanted if DECAYS.search(name)]
    assert decays
    for name in decays:
        errors = [float((found[name] - wanted[name]).abs().max()) for found in (ours, theirs)]
        assert errors[0] <= errors[1] + 1e-6 * float(wanted[name].abs().max()), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model_type, side):
    plain, fused = pair(model_type)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :9] = 0
    mask = mask if side == "left" else mask.flip(1)
    inputs = {"input_ids": tokens(70), "attention_mask": mask}
    ours, wanted = everything(fused, **inputs), everything(plain, **inputs)
    assert_all_close(ours, wanted)


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "qwen4_exp_text"])
def test_generation(model_type):
    """A prompt of several chunks fills the cache; single tokens go on from its states.

    The attention of Qwen4's wants sizes that a small config lacks.
    """
    plain, fused = pair(model_type) if model_type == "lara_mini" else with_attention(model_type)
    states = []
    for model in (fused, plain):
        with torch.no_grad():
            first = model(input_ids=tokens(70), use_cache=True)
            cache = first.cache
            second = model(input_ids=tokens(66), cache=cache, use_cache=True)
            third = model(input_ids=tokens(1), cache=cache, use_cache=True)
        states.append({str(i): out.logits for i, out in enumerate((first, second, third))})
    assert_all_close(*states)


def test_a_cache_in_training():
    """transformers makes one unless it is told not to; its states pass gradients to nobody here."""
    plain, fused = with_attention("qwen3_5_text")
    ids = tokens(70)
    assert_all_close(*(everything(m, input_ids=ids, use_cache=True) for m in (fused, plain)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    plain, fused = (model.train() for model in pair("qwen3_5_text"))
    wanted = everything(plain, input_ids=tokens(70))
    fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_all_close(everything(fused, input_ids=tokens(70)), wanted)


ROWS = [row for row in methods.ROWS if row.families is None and not row.data and not row.dropout]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_method_trains_to_the_same_losses(row):
    series = []
    for fused in (True, False):
        tuned = inlay.tune(QWEN.build(), row.make(), base=row.base, fused_blocks=fused)
        assert bool(rules(tuned)) == fused
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for seed in range(3):
            loss = tuned(**text_batch(seed, tokens=70)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        series.append(losses)
    assert_series(*series, rtol=2e-3)
    assert series[0][-1] != series[0][0]


def test_it_is_our_op_that_runs(monkeypatch):
    _, fused = with_attention("qwen3_5_text")
    calls, convolved = [], []
    original, convolution = delta_rule.gated_delta_rule, delta_rule.causal_conv1d
    monkeypatch.setattr(delta_rule, "gated_delta_rule", lambda *a, **k: calls.append(a[0].shape) or original(*a, **k))
    monkeypatch.setattr(delta_rule, "causal_conv1d", lambda *a, **k: convolved.append(1) or convolution(*a, **k))
    with torch.no_grad():
        fused(input_ids=tokens(7))
        fused(input_ids=tokens(1), cache=fused(input_ids=tokens(5), use_cache=True).cache)
    layers = len(rules(fused))
    assert [shape[1] for shape in calls] == [7] * layers + [5] * layers + [1] * layers
    assert len(convolved) == 2 * layers  # a single token's is an update of the cache's


def test_elsewhere_the_models_own_code_runs(monkeypatch):
    """In float64, which no kernel has, and on devices without one."""
    plain, fused = (model.double() for model in pair("qwen3_5_text"))
    monkeypatch.setattr(delta_rule, "gated_delta_rule", None)
    with torch.no_grad():
        ours, wanted = (first_tensor(model(input_ids=tokens(7))) for model in (fused, plain))
    assert_close(ours, wanted, atol=1e-6)


def test_samples_of_one_row_are_refused_as_the_model_refuses_them():
    _, fused = pair("qwen3_5_text")
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="packed sequences"):
        fused(input_ids=tokens(7, 1), cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=4, max_length_k=4)


def test_taken_off_copied_and_pickled():
    tuned = inlay.tune(QWEN.build(), inlay.LoRA(r=2)).eval()
    batch = text_batch(0)
    module = rules(tuned)[0]
    assert type(module).__name__ == "Qwen3_5GatedDeltaNet"
    with torch.no_grad():
        wanted = tuned(**batch).logits
        for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
            assert rules(other) and torch.equal(other(**batch).logits, wanted)
    merged = inlay.merge(tuned)
    assert not rules(merged)
    plain = type(merged.model.layers[0].linear_attn)
    assert plain.forward is qwen3_5_forward()


def qwen3_5_forward():
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    return Qwen3_5GatedDeltaNet.forward


def test_one_compiled_graph():
    torch.compiler.reset()
    tuned = inlay.tune(QWEN.build(), inlay.LoRA(r=2)).train()
    ids = tokens(70)
    wanted = tuned(input_ids=ids, labels=ids, use_cache=False).loss
    step = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    loss = step(input_ids=ids, labels=ids, use_cache=False).loss
    assert_close(loss, wanted, atol=1e-5)
    loss.backward()
    torch.compiler.reset()


# --- the proof -----------------------------------------------------------------------------------------------

OWN = qwen3_next.torch_chunk_gated_delta_rule


def changed(change):
    """transformers' function with something different about what it computes."""

    def torch_chunk_gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        chunk_size=64,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        **kwargs,
    ):
        out, last = OWN(
            query, key, value, g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel
        )
        return change(SimpleNamespace(**locals()))

    return torch_chunk_gated_delta_rule


def test_functions_are_told_apart():
    assert computes_gated_delta_rule(OWN)
    assert computes_gated_delta_rule(qwen3_next.torch_recurrent_gated_delta_rule)
    assert computes_gated_delta_rule(changed(lambda s: (s.out, s.last)))
    for change in (
        lambda s: (s.out * 1.001, s.last),
        lambda s: (s.out, None if s.last is None else s.last * 1.001),
        lambda s: (s.out.clamp(-50, 50), s.last),
        lambda s: (s.out, s.last if s.last is not None else s.out),
        lambda s: (s.out, None if s.last is None else s.last.mT),
        lambda s: (s.out * (1 + (s.g < -2).float()[..., None] * 1e-3), s.last),
    ):
        assert not computes_gated_delta_rule(changed(change))


def test_convolutions_are_told_apart():
    own = qwen3_next.causal_conv1d_fn

    def changed_convolution(change):
        def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
            return change(hidden_states, own(hidden_states, weight, bias, activation))

        return causal_conv1d_fn

    assert computes_causal_conv1d(own) and computes_causal_conv1d(changed_convolution(lambda x, y: y))
    for change in (
        lambda x, y: y * 1.001,
        lambda x, y: y.roll(1, -1),
        lambda x, y: y.clamp(-50, 50),
        lambda x, y: x + y,
    ):
        assert not computes_causal_conv1d(changed_convolution(change))
    assert not computes_causal_conv1d(lambda hidden_states, weight: own(hidden_states, weight))


def test_gated_norms_are_told_apart():
    from transformers.models.lara_mini.modeling_lara_mini import LaraMiniRMSNormGated
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    norm = qwen3_next.Qwen3NextRMSNormGated
    found = {"inlay_eps": 1e-6, "inlay_act": "silu"}
    assert gated_norm_settings(norm(16)) == gated_norm_settings(LaraMiniRMSNormGated(16)) == found
    assert gated_norm_settings(MambaRMSNormGated(16, 16)) is None  # which gates before it normalizes
    assert gated_norm_settings(qwen3_next.Qwen3NextRMSNorm(16)) is None

    class Scaled(norm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states, gate) * 1.001

    class OtherEps(norm):
        def forward(self, hidden_states, gate):
            rms = (hidden_states.square().mean(-1, keepdim=True) + 2 * self.variance_epsilon).sqrt()
            return self.weight * hidden_states / rms * nn.functional.silu(gate)

    class Sigmoid(norm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states, gate) * gate.sigmoid() / nn.functional.silu(gate)

    for kind in (Scaled, OtherEps, Sigmoid):
        assert gated_norm_settings(kind(16)) is None


def test_a_gate_of_another_dtype_takes_the_norms_own_way():
    norm = qwen3_next.Qwen3NextRMSNormGated(16)
    fused = nn.Sequential(copy.deepcopy(norm))
    assert install_blocks(fused) == {"FusedGatedRMSNorm": 1}
    x, gate = torch.randn(3, 16).bfloat16(), torch.randn(3, 16)
    assert torch.equal(fused[0](x, gate), norm(x, gate))


def test_another_signature_is_left_alone():
    def gated(query, key, value, g, beta, chunk_size=64, window=None, **kwargs):
        return OWN(query, key, value, g, beta, chunk_size, **kwargs)

    assert not computes_gated_delta_rule(gated)


def test_a_forward_on_the_instance_is_left_alone():
    model, _ = tiny_model("qwen3_5_text")
    first = model.model.layers[0].linear_attn
    first.forward = first.forward
    install_blocks(model)
    assert not isinstance(first, FusedDeltaRule) and len(rules(model)) == 1


def test_what_transformers_has_to_say_of_its_loops_is_kept_for_when_they_run(monkeypatch):
    """The proof runs them, and says nothing that would not be said again."""
    said = []
    monkeypatch.setattr(qwen3_next.torch_chunk_gated_delta_rule.__globals__["logger"], "warning", said.append)
    computes_gated_delta_rule.cache_clear()
    transformers.utils.logging.warning_once.cache_clear()
    assert computes_gated_delta_rule(OWN) and not said
    OWN(*(torch.zeros(1, 1, 1, 2) for _ in range(3)), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    assert len(said) == 1 and "much slower" in said[0]


# --- functions with others in place of what they call --------------------------------------------------------


def _called(x):
    return x + 1


def _caller(x, *, times=2):
    """Calls."""
    return times * _called(x)


def _doubling(function):
    import functools

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapped


def test_calls_go_elsewhere_and_nobody_else_sees_it():
    made = exchanged(_caller, {"_called": lambda x: x + 10})
    assert made(1) == 22 and made(1, times=3) == 33 and _caller(1) == 4
    assert made.__doc__ == "Calls." and made.__name__ == "_caller"


def test_decorators_are_kept():
    decorated = _doubling(_doubling(_caller))
    made = exchanged(decorated, {"_called": lambda x: x + 10})
    assert made(1) == 88 and decorated(1) == 16


def test_a_decorator_that_hides_what_it_decorates_is_not_passed_over():
    held = [_caller]

    def hidden(x):
        return held[0](x)

    hidden.__wrapped__ = _caller
    assert exchanged(hidden, {"_called": lambda x: 0}) is None
