"""Each way in which a run could silently train on nothing, or on NaN, stops it and says why."""

import pytest
import torch
from test_finetune import METHOD, QUICK, RECORDS, tuned
from toys import build_model, build_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from inlay.data import TrainingData, prepare
from inlay.train import finetune
from inlay.train.trainer import check_gradients


def run(model=None, data=RECORDS, **options):
    return finetune(model or tuned(), build_tokenizer(), data, **(QUICK | options))


def test_unknown_training_argument():
    with pytest.raises(TypeError, match="unknown training argument 'learning_rat'; did you mean 'learning_rate'"):
        run(learning_rat=1e-3)
    with pytest.raises(TypeError, match="did you mean 'max_length'"):
        run(max_lenght=64)


def test_model_and_method_must_fit():
    with pytest.raises(ValueError, match="wanted a tuned model or a method"):
        run(build_model())
    with pytest.raises(ValueError, match="tuned already"):
        run(method=METHOD)
    tiny = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="encoder-decoder"):
        run(T5ForConditionalGeneration(tiny), method=METHOD)


def test_no_supervised_token_in_the_data_or_in_a_batch():
    with pytest.raises(ValueError, match="got none in all 10 records"):
        run(data=[{"prompt": "the mat " * 20, "completion": "x"}] * 10, max_length=8)
    prepared = prepare(RECORDS, build_tokenizer())
    blank = [{"input_ids": s["input_ids"], "labels": [-100] * len(s["labels"])} for s in prepared.samples]
    with pytest.raises(ValueError, match="step 0: wanted at least one supervised token in the batch"):
        run(data=TrainingData(blank, prepared.report))


def test_a_trainable_that_reaches_no_loss_is_named():
    model = tuned()
    model.register_parameter("orphan", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match="got none for orphan"):
        run(model)


def test_a_gradient_that_is_not_finite_is_named():
    model = tuned()
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][-1]
    parameter.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match=f"NaN or infinity in {name}"):
        run(model)


def test_gradients_are_checked_after_accumulation():
    model = tuned()
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    check_gradients(model)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = build_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: wanted a finite loss, got nan"):
        run(model, method=METHOD)


def test_saving_needs_an_output_dir():
    with pytest.raises(ValueError, match="save_strategy='steps' wants an output_dir"):
        run(save_strategy="steps")
