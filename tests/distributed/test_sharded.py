"""What FSDP2 does to a model in one process: enough to see DTensors, gathers and what is refused."""

import math

import families
import pytest
import torch
import torch.distributed as dist
from comparing import assert_close, assert_equal
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import inlay

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(autouse=True)
def _group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sharded(model, *units):
    for unit in (*model.model.layers, *units):
        fully_shard(unit)
    return fully_shard(model)


def loss_and_gradients(model):
    tokens = families.prompt(tokens=9, rows=2)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss, {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def test_an_output_head_that_is_a_unit_of_its_own():
    """The fused loss reads its weight after FSDP2 has sharded it again."""
    plain = inlay.tune(families.llama(), inlay.LoRA(r=4)).train()
    model = inlay.tune(families.llama(), inlay.LoRA(r=4)).train()
    wanted, gradients = loss_and_gradients(plain)
    loss, got = loss_and_gradients(sharded(model, model.lm_head))
    assert model.loss_function.last == "fused"
    assert_close(loss, wanted, atol=1e-6)
    for name, gradient in gradients.items():
        assert_close(got[name], gradient, atol=1e-6, what=name)


def test_in_place_values_are_refused_where_the_base_is_gathered_anew(tmp_path):
    model = sharded(inlay.tune(families.llama(), inlay.S2FT(ratio=0.25, update="in_place")))
    with pytest.raises(ValueError, match='layers.0.self_attn.o_proj: update="in_place".*use update="additive"'):
        model.train()
    with pytest.raises(ValueError, match="in_place"):
        model.save_pretrained(str(tmp_path))


def test_an_untrained_sharded_adapter_is_refused_as_a_whole_one_is(tmp_path):
    model = sharded(inlay.tune(families.llama(), inlay.S2FT(ratio=0.25)))
    with pytest.raises(ValueError, match="changes nothing"):
        model.save_pretrained(str(tmp_path))


def test_the_list_for_ddp_keeps_other_names_and_goes_with_the_adapter():
    model = families.llama()
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    inlay.tune(model, inlay.S2FT(ratio=0.25), base="nf4")
    listed = set(model._ddp_params_and_buffers_to_ignore)
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert listed - named == {"mine"}
    assert {name.rpartition(".")[2] for name in listed - {"mine"}} == {"packed", "absmax", "s2ft_indices"}
    assert inlay.merge(model)._ddp_params_and_buffers_to_ignore == ["mine"]


def test_accelerate_would_miss_blocks_of_another_class():
    """What `test_accelerate_finds_every_block_to_shard` is about: plain blocks behind a mixed first one."""
    from inlay.nn.mixed import unmix

    model = inlay.tune(families.llama(num_hidden_layers=3), inlay.S2FT(ratio=0.25))
    first = type(model.model.layers[0])
    assert all(isinstance(block, first) for block in model.model.layers)
    assert not isinstance(unmix(model.model.layers[1]), first)


def test_8bit_states_of_sharded_parameters_are_refused():
    model = sharded(inlay.tune(families.llama(), inlay.LoRA(r=4)).train())
    optimizer = inlay.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], min_8bit_size=1)
    loss_and_gradients(model)
    with pytest.raises(TypeError, match="use AdamW, or DDP"):
        optimizer.step()


@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
@pytest.mark.parametrize("mesh, placements", [((3,), "S"), ((2, 2), "RS"), ((2, 3), "SS")])
def test_each_part_of_bf16_parameters_is_stepped_as_in_the_whole(rounding, mesh, placements):
    """Seven rows among so many processes, of which the last may hold none; this one is each of them in turn."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    values, gradients = torch.randn(7, 5).bfloat16(), torch.randn(3, 7, 5).bfloat16()
    other = torch.randn(300).bfloat16()  # the first of both optimizers' parameters

    def stepped(shard):
        params = [torch.nn.Parameter(other.clone()), torch.nn.Parameter(shard(values.clone()))]
        optimizer = inlay.optim.AdamW(params, lr=0.01, rounding=rounding, seed=3)
        for gradient in gradients:
            params[1].grad = shard(gradient)
            optimizer.step()
        return params[1].detach(), optimizer.state[params[1]].get("residual")

    wanted, residual = stepped(lambda tensor: tensor)
    seen = 0
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=math.prod(mesh), store=fake.FakeStore())
    for at in range(math.prod(mesh)):
        device_mesh = DeviceMesh("cpu", torch.arange(math.prod(mesh)).roll(at).view(mesh))
        places = [Shard(0) if place == "S" else Replicate() for place in placements]
        got, kept = stepped(lambda t: distribute_tensor(t, device_mesh, places, src_data_rank=None))  # noqa: B023
        shape, (row, _) = compute_local_shape_and_global_offset(values.shape, device_mesh, places)
        here = slice(row, row + shape[0])
        assert_equal(got.to_local(), wanted[here], what=f"process {at}")
        seen += shape[0]
        if residual is not None:
            assert_equal(kept.to_local(), residual[here], what=f"residual of process {at}")
    assert seen == 7 * (mesh[0] if placements[0] == "R" else 1)


def test_parts_that_are_no_rows_are_refused():
    device_mesh = DeviceMesh("cpu", [0])
    columns = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6).bfloat16(), device_mesh, [Shard(1)]))
    columns.grad = torch.ones_like(columns)
    with pytest.raises(TypeError, match="sharded by rows, got .*shard it along dimension 0"):
        inlay.optim.AdamW([columns], rounding="stochastic").step()
    inlay.optim.AdamW([columns], rounding="residual").step()  # each element has its own
