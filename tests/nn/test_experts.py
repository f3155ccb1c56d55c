"""Modules of experts of many families: what is proven of them, and that the fused forward is their own."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from comparing import assert_close
from torch import nn

import inlay
from inlay.nn.blocks import install_blocks
from inlay.nn.expert_layout import compute_experts, holds_experts, layout_of
from inlay.nn.experts import FusedExperts, hold_experts
from inlay.nn.mixed import unmix
from inlay.ops.expert_gate import Gate

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1}


def experts_of(model: str, name: str, **options) -> nn.Module:
    """The experts of a family with random weights."""
    config = getattr(hf, f"{name}Config")(**(_SIZES | options))
    config._experts_implementation = "eager"
    module = __import__(f"transformers.models.{model}.modeling_{model}", fromlist=["x"])
    found = next(
        v for k, v in vars(module).items() if k.endswith("Experts") and k.startswith(name.removesuffix("Config"))
    )
    made = found(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return made


SILU = Gate("silu")
#: model, class, options, what is found: stored transposed, gate, biases, arguments.
FOUND = [
    ("mixtral", "Mixtral", {"num_local_experts": 5}, (False, SILU, False, 3)),
    ("qwen2_moe", "Qwen2Moe", {"num_experts": 5}, (False, SILU, False, 3)),
    ("qwen3_moe", "Qwen3Moe", {"num_experts": 5}, (False, SILU, False, 3)),
    ("olmoe", "Olmoe", {"num_experts": 5}, (False, SILU, False, 3)),
    ("deepseek_v2", "DeepseekV2", {"n_routed_experts": 5, "num_attention_heads": 2}, (False, SILU, False, 3)),
    ("deepseek_v3", "DeepseekV3", {"n_routed_experts": 5}, (False, SILU, False, 3)),
    ("glm4_moe", "Glm4Moe", {"n_routed_experts": 5}, (False, SILU, False, 3)),
    ("granitemoe", "GraniteMoe", {"num_local_experts": 5}, (False, SILU, False, 3)),
    ("gpt_oss", "GptOss", {"num_local_experts": 5}, (True, Gate("clamped", True, 1.702, 7.0, 1.0), True, 3)),
    ("llama4", "Llama4Text", {"num_local_experts": 5}, (True, SILU, False, 1)),
    ("nemotron_h", "NemotronH", {"n_routed_experts": 5}, (False, None, False, 3)),
]
every_family = pytest.mark.parametrize("model, name, options, found", FOUND, ids=[row[0] for row in FOUND])


def inputs_for(module: nn.Module, tokens: int = 9) -> list[torch.Tensor]:
    """Tokens with their experts, of which one has none; or rows that are sorted."""
    torch.manual_seed(1)
    if layout_of(module).sorted:
        return [torch.randn(15, 16)]
    index = torch.rand(tokens, 4).topk(2).indices
    return [torch.randn(tokens, 16), index, torch.rand(tokens, 2)]


@every_family
def test_a_layout_is_found_and_proven(model, name, options, found):
    layout = layout_of(experts_of(model, name, **options))
    assert (layout.transposed, layout.gate, layout.up_bias is not None, len(layout.arguments)) == found


@every_family
def test_fused_they_compute_what_they_did(model, name, options, found):
    """Output and every gradient, in fp32; under each name that a caller gives the arguments."""
    module = experts_of(model, name, **options)
    inputs, eager = inputs_for(module), copy.deepcopy(module)
    assert install_blocks(module) == {"FusedExperts": 1} and isinstance(module, FusedExperts)
    results = []
    for held in (eager, module):
        given = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = held(*given)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        grads = [t.grad for t in (*given, *held.parameters()) if t.grad is not None]
        results.append([out.detach(), *grads])
        held.zero_grad()
    assert (
        len(results[0])
        == len(results[1])
        == 1 + len([t for t in inputs if t.is_floating_point()]) + len(list(module.parameters()))
    )
    for ours, wanted in zip(results[1], results[0], strict=True):
        assert_close(ours, wanted, atol=2e-5 * float(wanted.abs().max()), what=f"{model} {tuple(wanted.shape)}")
    named = dict(zip(layout_of(module).arguments[1:], inputs[1:], strict=True))
    assert torch.equal(module(inputs[0], **named), results[1][0])
    assert type(unmix(module)) is type(eager) and "inlay_experts" not in module.__dict__


def test_no_tokens_one_token_and_all_to_one_expert():
    module = experts_of("qwen3_moe", "Qwen3Moe", num_experts=5)
    fused = copy.deepcopy(module)
    install_blocks(fused)
    x, weights = torch.randn(6, 16), torch.rand(6, 1)
    for tokens, expert in ((0, 0), (1, 4), (6, 2)):
        index = torch.full((tokens, 1), expert)
        ours, wanted = (held(x[:tokens], index, weights[:tokens]) for held in (fused, module))
        assert_close(ours, wanted, atol=1e-5 * 20, what=f"{tokens} tokens")


def test_bf16_is_as_exact_as_transformers_and_autocast_is_followed():
    module = experts_of("mixtral", "Mixtral", num_local_experts=5)
    x, index, weights = inputs_for(module)
    exact = copy.deepcopy(module).double()(x.bfloat16().double(), index, weights.double())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    exact = copy.deepcopy(module).double()(x.bfloat16().double(), index, weights.double())
    half = copy.deepcopy(module).bfloat16()
    eager = half(x.bfloat16(), index, weights.bfloat16().float())
    install_blocks(half)
    ours = half(x.bfloat16(), index, weights)
    assert float((ours - exact).norm()) <= 1.2 * float((eager - exact).norm())
    install_blocks(module)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(x, index, weights)
    assert cast.dtype == torch.float32
    assert float((cast - exact).norm() / exact.norm()) < 0.02


def test_experts_of_several_processes_run_as_they_did(monkeypatch):
    module = experts_of("mixtral", "Mixtral", num_local_experts=5)
    x, index, weights = inputs_for(module)
    wanted = module(x, index, weights)
    install_blocks(module)
    module._is_expert_parallel = True
    monkeypatch.setattr("inlay.nn.experts.compute_experts", None)  # which would not be told of the others
    assert torch.equal(module(x, index, weights), wanted)


class Odd(nn.Module):
    """Experts as transformers has them, but for a detail."""

    def __init__(self, detail: str) -> None:
        super().__init__()
        self.detail, self.num_experts = detail, 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 24))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, expert in ((t, int(e)) for t, row in enumerate(top_k_index) for e in row):
            gate, up = (hidden_states[token] @ self.gate_up_proj[expert].t()).chunk(2)
            y = (self.act_fn(gate) * up) @ self.down_proj[expert].t()
            y = y / y.norm() if self.detail == "normed" else y
            share = top_k_weights[token, (top_k_index[token] == expert).nonzero()[0, 0]]
            out[token] += y * (share if self.detail != "unweighted" else 1.0)
        return out + hidden_states if self.detail == "residual" else out


def test_what_computes_something_else_is_left_alone_and_refused():
    assert layout_of(Odd("none")) is not None
    for detail in ("normed", "unweighted", "residual"):
        module = Odd(detail)
        assert holds_experts(module) and layout_of(module) is None
        assert install_blocks(module) == {}
        with pytest.raises(ValueError, match=r"here: wanted a module of experts whose forward is understood.*Odd"):
            hold_experts(module, "here")
    module = Odd("none")
    module.forward = lambda *args: args[0]
    assert layout_of(module) is None


def test_an_activation_of_the_module_s_own_is_called():
    class Own(Odd):
        def _apply_gate(self, gu):
            return self.act_fn(gu.chunk(2, -1)[0]) * gu.chunk(2, -1)[1]

    class Lies(Odd):
        def _apply_gate(self, gu):
            return gu.chunk(2, -1)[0]

    module, other = Own("none"), Lies("none")
    module.act_fn = other.act_fn = nn.Softsign()
    assert layout_of(other) is None
    layout = layout_of(module)
    assert layout.gate is None
    x, index, weights = torch.randn(5, 16), torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
    ours = compute_experts(module, layout, x, index, weights)
    assert_close(ours, module(x, index, weights), atol=1e-3, what="softsign")


def test_a_tuned_mixture_says_what_it_leaves_alone():
    config = hf.MixtralConfig(**(_SIZES | {"num_local_experts": 4, "vocab_size": 40, "num_attention_heads": 2}))
    config.num_key_value_heads = 2
    with pytest.warns(UserWarning, match=r"fused expert weights.*target_parameters"):
        inlay.tune(hf.MixtralForCausalLM(config), inlay.LoRA(r=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused expert weights")
        names = ["experts.gate_up_proj", "experts.down_proj"]
        tuned = inlay.tune(hf.MixtralForCausalLM(config), inlay.LoRA(r=2, target_parameters=names))
    rows = {row.name: row for row in inlay.coverage.coverage(tuned)}
    assert rows["gate_up_proj"].tuned == rows["down_proj"].tuned == rows["q_proj"].tuned == 1
