"""Two processes train what one process trains on the same global batch: DDP and FSDP2, dense and four-bit bases."""

import json
from pathlib import Path

import families
import pytest
import torch
from comparing import assert_close, assert_series, assert_state_equal
from launch import once, torchrun
from safetensors.torch import load_file
from scenarios import GLOBAL_BATCH, METHODS, PLAIN, batches, build, plain, trained, trainer_run

import inlay
from inlay.adapters.files import CONFIG_NAME, RESUME_NAME, WEIGHTS_NAME

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One pair of processes runs every scenario: starting processes takes longer than training in them."""
    return once(tmp_path_factory, "plain", lambda folder: torchrun(HERE / "worker.py", "plain", str(folder)))


@pytest.fixture(scope="module")
def trainer_out(tmp_path_factory):
    return once(tmp_path_factory, "trainer", lambda folder: torchrun(HERE / "worker.py", "trainer", str(folder)))


def facts(out, scenario):
    return json.loads((out / f"{scenario}.json").read_text())


@pytest.mark.parametrize("scenario", PLAIN, ids=str)
def test_losses_and_adapter_are_those_of_one_process(out, scenario, tmp_path):
    model = build(scenario)
    losses = [float(loss) for loss in trained(model, scenario, batches(scenario))]
    if scenario.method != "tied":  # random tokens: four steps on their rows teach nothing of the next batch's
        assert losses[-1] < losses[0]
    assert len(set(losses)) == len(losses)
    assert_series(facts(out, scenario)["losses"], losses, rtol=1e-5)
    model.save_pretrained(str(tmp_path))
    for name in (WEIGHTS_NAME, RESUME_NAME):
        wanted, got = load_file(tmp_path / name), load_file(out / str(scenario) / name)
        assert sorted(got) == sorted(wanted)
        for key, tensor in wanted.items():
            assert_close(got[key], tensor, atol=2e-5, what=key)


@pytest.mark.parametrize("scenario", PLAIN, ids=str)
def test_the_saved_adapter_loads_in_one_process(out, scenario):
    model = build(scenario)
    for _ in trained(model, scenario, batches(scenario)):
        pass
    base = plain(scenario)
    quantized = None if scenario.base == "dense" else inlay.BaseConfig("nf4", double_quant=scenario.base == "nested")
    loaded = inlay.load(base, out / str(scenario), base=quantized)
    tokens = families.prompt(tokens=7, rows=2)
    batch = {"input_ids": tokens}
    assert_close(families.eval_logits(loaded, batch), families.eval_logits(model, batch), atol=1e-4)


@pytest.mark.parametrize("scenario", [s for s in PLAIN if s.base != "dense"], ids=str)
def test_a_packed_base_is_sharded_by_fsdp_and_whole_under_ddp(out, scenario):
    held = facts(out, scenario)
    whole = held["packed_before"]
    assert whole > 0
    after = [rank["packed_after"] for rank in held["ranks"]]
    assert after == ([whole, whole] if scenario.engine == "ddp" else [whole // 2, whole // 2])


@pytest.mark.parametrize("scenario", [s for s in PLAIN if s.engine == "ddp"], ids=str)
def test_ddp_sends_neither_packed_weights_nor_indices(out, scenario):
    held = facts(out, scenario)
    assert held["synced_buffers"] == []
    assert all(rank["marks_kept"] for rank in held["ranks"])


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_chose_other_channels_or_have_another_base_are_told(out, rank):
    said = json.loads((out / f"disagreement.{rank}.json").read_text())
    assert said["nothing"] == "" and all(
        "in all 2 processes, got 2 different" in said[what] for what in ("seed", "base")
    )


def test_changed_rows_of_sharded_tensors_are_those_of_whole_ones(out):
    scenario = next(s for s in PLAIN if (s.engine, s.method) == ("fsdp", "full"))
    config = json.loads((out / f"{scenario}-delta" / CONFIG_NAME).read_text())
    assert "model.embed_tokens.weight" in config["inlay"]["delta"]
    wanted, got = (inlay.load(plain(scenario), out / folder) for folder in (str(scenario), f"{scenario}-delta"))
    assert_state_equal(got.state_dict(), wanted.state_dict())


def test_green_trainer_chooses_the_same_on_all_ranks(out):
    one, two = json.loads((out / "green.json").read_text())
    assert one == two and 0 < sum(one) < len(one)


@pytest.mark.parametrize("scenario", PLAIN, ids=str)
def test_trainables_stay_fp32(out, scenario):
    assert facts(out, scenario)["trainable_dtypes"] == ["torch.float32"]


def test_finetune_in_two_processes_is_finetune_in_one(trainer_out, tmp_path):
    one = trainer_run(tmp_path, per_device_train_batch_size=GLOBAL_BATCH)
    two = json.loads((trainer_out / "trainer.json").read_text())
    assert_series(two["losses"], one.losses, rtol=1e-4)
    assert two["tokens"] == pytest.approx(one.tokens_per_second * one.seconds)  # of both ranks, padding not counted
    wanted, got = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path, trainer_out / "trainer"))
    for key, tensor in wanted.items():
        assert_close(got[key], tensor, atol=1e-4, what=key)


@pytest.mark.parametrize("method", ["s2ft", "lora"])
def test_accelerate_finds_every_block_to_shard(method):
    """It looks for the class of the first block, and shards the modules that are instances of it."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = inlay.tune(families.llama(num_hidden_layers=3), METHODS[method]())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [policy(block) for block in model.model.layers] == [True] * 3
