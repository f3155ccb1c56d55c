"""What all raw ops share: torch.library registration, choice of path, threads, tracing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay import _native, ops
from inlay.ops._registry import RAW_OPS

INDICES = torch.tensor([0, 2, 5])


def _attention_examples():
    q, k, v, do = (torch.randn(1, 9, h, 32).bfloat16().transpose(1, 2) for h in (4, 2, 2, 4))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    spans = torch.tensor([[0, 1], [0, 2], [0, 3], [2, 4], [2, 4], [2, 9], [4, 9], [4, 9], [8, 9]])[None]
    return {
        "attention_forward": (q, k, v, spans, torch.randn(4), 32**-0.5, 3.0),
        "attention_backward": (do, q, k, v, o, lse, spans, 32**-0.5, 3.0),
        "attention_sinks": (do, o, lse, torch.randn(4)),
    }


def _coded_states():
    params, grads = ([torch.rand(300), torch.rand(2, 2)] for _ in range(2))
    codes = [[torch.full(p.shape, 127, dtype=torch.uint8) for p in params] for _ in range(2)]
    scales = [[torch.zeros(-(-p.numel() // 256)) for p in params] for _ in range(2)]
    return params, grads, *codes, *scales


def _examples():
    x, acc = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    q = torch.randn(2, 5, 3, 8).transpose(1, 2)
    cos = torch.randn(1, 5, 8)
    lists = [[torch.rand(3), torch.rand(2, 2)] for _ in range(4)]
    packed = torch.arange(24, dtype=torch.uint8), torch.ones(2)  # 6 x 8 in blocks of 32
    return {
        "submatrix_gather": (x, INDICES, torch.float32),
        "submatrix_add": (x, acc),
        "submatrix_add_": (x, acc),
        "submatrix_scatter_add_": (x, INDICES, acc[:, :3].contiguous()),
        "submatrix_write_": (x, INDICES, acc[:, :3].contiguous(), 1),
        "submatrix_grad": (x, x[:, :3]),
        "submatrix_grad_into_": (torch.zeros(8, 3), x, x[:, :3], True),
        "lora_add_": (x, acc.bfloat16(), torch.randn(2, 8), torch.randn(8, 2), 1.5),
        "lora_backward": (x, x[:, :3].clone(), torch.randn(8, 3).bfloat16()),
        "swiglu_forward": (x, x.clone(), "silu"),
        "swiglu_backward": (x, x.clone(), x.clone(), "gelu", INDICES),
        "rms_norm_forward": (x, torch.randn(8), 1e-5, 1.0),
        "rms_norm_backward": (x, x.clone(), torch.randn(8), torch.rand(4), 0.0, True, True),
        "scale_shift_forward": (x, torch.randn(8), torch.randn(8), None),
        "scale_shift_backward": (x, x.clone(), torch.randn(8), None, True, True, True),
        "rope_rotate": (q, q.clone(), cos, cos.clone(), True),
        "cross_entropy_chunk_": (acc, torch.tensor([1, 2, 3, 0]), 0.5, True),
        **_attention_examples(),
        "quantized_lora_linear_small": (x, *packed, None, None, None, acc[:2], acc[:3, :2].repeat(2, 1), 0.5)
        + ("nf4", 32, 6),
        "adamw_step_": (*lists, 0.1, 0.9, 0.99, 1e-8, 0.1, 1, 1.0),
        "adamw_8bit_step_": (*_coded_states(), 0.1, 0.9, 0.99, 1e-8, 0.1, 1, 1.0),
    }


def test_every_op_is_opchecked():
    """By an example here, or by the test file of its own."""
    assert set(_examples()) <= set(RAW_OPS)
    for name in set(RAW_OPS) - set(_examples()):
        stem = RAW_OPS[name].reference.__module__.rpartition(".")[2]
        own = Path(__file__).with_name(f"test_{stem}.py")
        assert not own.exists() or "opcheck" in own.read_text(), f"{name}: add an opcheck to {own.name}"


@pytest.mark.parametrize("name", sorted(_examples()))
def test_opcheck(path, name):
    torch.library.opcheck(RAW_OPS[name].overload, _examples()[name])


@pytest.mark.parametrize("name", sorted(_examples()))
def test_goes_through_torch_ops_under_a_mode(name):
    """A FakeTensor's data_ptr is 0: it must reach the fake, never a kernel."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, _examples()[name])
        RAW_OPS[name](*args)


@pytest.mark.skipif(not _native.available(), reason="no native module")
@pytest.mark.parametrize("name", sorted(set(_examples()) - {"submatrix_grad", "submatrix_grad_into_"}))
def test_results_do_not_depend_on_threads(name):
    def run(threads):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        hidden, width = torch.randn(301, 1203).bfloat16(), 1203
        chosen = torch.arange(0, width, 7)
        acc = torch.randn(301, width)
        calls = {
            "swiglu_backward": (hidden, hidden * 2, hidden + 1, "silu", chosen),
            "swiglu_forward": (hidden, hidden * 2, "silu"),
            "rms_norm_forward": (hidden, torch.randn(width), 1e-5, 0.0),
            "rms_norm_backward": (hidden, hidden + 1, torch.randn(width), torch.rand(301), 0.0) + (True, True),
            "scale_shift_forward": (hidden, torch.randn(width), torch.randn(width), None),
            "scale_shift_backward": (hidden, hidden + 1, torch.randn(width), None, True, True, True),
            "cross_entropy_chunk_": (hidden, torch.randint(0, width, (301,)), 1.0, True),
            "submatrix_add": (hidden, acc),
        }
        args = calls.get(name, _examples()[name])
        out = RAW_OPS[name](*args)
        return [t for t in torch.utils._pytree.tree_leaves((out, args)) if isinstance(t, torch.Tensor)]

    before = torch.get_num_threads()
    try:
        one, many = run(1), run(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_threads_follow_torch():
    if not _native.available():
        pytest.skip("no native module")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _native.module().num_threads() == threads
    finally:
        torch.set_num_threads(before)


def _python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_unknown_isa_names_what_exists():
    code = "import torch; from inlay import ops; ops.swiglu(torch.ones(1, 2), torch.ones(1, 2))"
    if not _native.available():
        pytest.skip("no native module")
    result = _python(code, INLAY_ISA="sse9")
    assert result.returncode and "wanted one of scalar" in result.stderr


def test_works_without_native_module():
    code = (
        "import sys; sys.modules['inlay._C'] = None\n"
        "import torch; from inlay import ops, _native\n"
        "assert not _native.available()\n"
        "ops.swiglu(torch.ones(1, 2), torch.ones(1, 2))\n"
        "ctx = ops.force_path('native'); ctx.__enter__()\n"
        "try: ops.swiglu(torch.ones(1, 2), torch.ones(1, 2))\n"
        "except RuntimeError as error: assert 'inlay._C' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr


def test_forced_native_refuses_what_it_cannot_do():
    if not _native.available():
        pytest.skip("no native module")
    with ops.force_path("native"), pytest.raises(RuntimeError, match="float64"):
        ops.swiglu(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.slow
def test_functions_compile():
    """The autograd Functions trace without a graph break and give the same gradients."""
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))

    def step(gate, up):
        return ops.rms_norm(ops.swiglu(gate, up), None, 1e-5).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(step(gate, up), (gate, up))
    torch.testing.assert_close(torch.autograd.grad(compiled(gate, up), (gate, up)), wanted)
