"""transformers' Trainer with the checks that stop a run which would train on nothing, or on NaN.

Overridden are create_optimizer, training_step and prediction_step, which transformers documents for
that, and the choice of the sampler for `train_sampling_strategy="group_by_length"`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.collate import count_padding
from ..data.masking import IGNORED
from ..data.sampling import LengthGroupedSampler
from ..integrations.padding_free import row_width
from ..nn.head import losses_only
from ..schedules import may_train
from ..state import state_of
from .memory import return_free_memory

#: Names of ``optim`` that transformers gives bitsandbytes' AdamW with 8-bit states; ours stores the same.
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit")


class Trainer(transformers.Trainer):
    """Trains with inlay's AdamW unless `optim` names another, and keeps the books.

    Attributes:
        losses: the loss of every optimizer step of this run.
        tokens: input tokens trained on, padding not counted.
        padding: padding positions computed for nothing.
        meter: time spent in steps, without evaluation and saving.
    """

    optimizer: Any  # transformers creates it late, and declares it nowhere

    def __init__(self, *args: Any, pad_token_id: int = -1, inlay_optimizer: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.tokens = 0
        self.padding = 0
        self.meter = StepTimer()
        self.add_callback(self.meter)
        self.frozen: Any = None  # the cache of states and the model's Replay, while inlay.train.frozen_cache runs
        self._pad_token_id = pad_token_id
        self._inlay_optimizer = inlay_optimizer
        self._step_loss = 0.0
        self._gradients_checked = False
        self._last_shape: tuple[int, ...] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self._inlay_optimizer:
            self.optimizer = self._create_adamw(self.model if model is None else model)
        return super().create_optimizer(model)

    def _create_adamw(self, model: nn.Module) -> torch.optim.Optimizer:
        from ..optim import AdamW, AdamW8bit

        decayed = set(self.get_decay_parameter_names(model))
        trainable = list(may_train(model).items())
        groups = [
            {"params": [p for name, p in trainable if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
        ]
        kind = AdamW8bit if self.args.optim in EIGHT_BIT else AdamW
        return kind(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            rounding=rounding_of(model),
            seed=self.args.seed,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(
            dataset.lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, seed
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        self._check_supervised(inputs)
        self._make_room(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._count(inputs)
        self._record(float(loss))
        if not self._gradients_checked and self.accelerator.sync_gradients:
            # Here, before clipping: one NaN would make the norm NaN, and with it every gradient.
            check_gradients(model)
            self._gradients_checked = True
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        numbers, state = inputs.pop("number", None), state_of(self.model)
        frozen: Any = nullcontext()
        if self.frozen is not None and numbers is not None:
            cache, replay = self.frozen
            frozen = cache.step(replay, numbers, inputs["attention_mask"] != 0)
        unread = state.padding_free.only_the_loss() if state is not None and not return_outputs else nullcontext()
        with frozen, unread:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def _make_room(self, inputs: dict[str, Tensor]) -> None:
        """On a CPU, give back the holes in the heap that a batch of another shape left."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if not ids.is_cpu:
            return
        shape = (*ids.shape, -1 if mask is None else row_width(int(mask.sum())))
        if shape != self._last_shape:
            return_free_memory()
            self._last_shape = shape

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Any]:
        self._make_room(inputs)
        # Logits that nobody reads would be the largest tensors of a whole run.
        with losses_only(self.model) if prediction_loss_only else nullcontext():
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _check_supervised(self, inputs: dict[str, Tensor]) -> None:
        labels = inputs["labels"]
        if not bool((labels[:, 1:] != IGNORED).any()):
            raise ValueError(
                f"step {self.state.global_step}: wanted at least one supervised token in the batch, got none "
                "(every label behind position 0 is -100); check the completions, max_length and the collator"
            )

    def _count(self, inputs: dict[str, Tensor]) -> None:
        """After a step: what it was given, and what of that it computed."""
        labels, state = inputs["labels"], state_of(self.model)
        real = labels.numel() - count_padding(inputs["input_ids"], labels, self._pad_token_id)
        computed = None if state is None else state.padding_free.computed
        self.padding += (labels.numel() if computed is None else computed) - real
        self.tokens += real

    def _record(self, loss: float) -> None:
        if not -float("inf") < loss < float("inf"):
            raise FloatingPointError(
                f"step {self.state.global_step}: wanted a finite loss, got {loss}; lower the learning_rate, use "
                "warmup_steps, or load the model in float32; resume_from_checkpoint continues from the last checkpoint"
            )
        self._step_loss += loss
        if self.accelerator.sync_gradients:
            mean = self.over_processes(self._step_loss) / self.args.world_size
            self.losses.append(mean)
            self._step_loss = 0.0

    def over_processes(self, value: float) -> float:
        """The sum of what every process holds: each has its own share of the samples."""
        if self.args.world_size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.reduce(held, "sum"))


def rounding_of(model: nn.Module) -> str:
    """How AdamW rounds 16-bit weights that train: as the active method says, else exactly."""
    state = state_of(model)
    wanted = [getattr(state.methods[name], "rounding", "residual") for name in state.active] if state else []
    return "stochastic" if "stochastic" in wanted else "residual"


class StepTimer(TrainerCallback):
    """Seconds in training steps: forward, backward, optimizer."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


def check_gradients(model: nn.Module) -> None:
    """Raise, naming the first trainable parameter whose gradient is missing or not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            raise RuntimeError(
                f"wanted a gradient for every trainable parameter after the first step, got none for {name}: nothing "
                "it feeds reaches the loss; leave it out of target_modules, or check gradient checkpointing"
            )
        if not bool(torch.isfinite(parameter.grad).all()):
            raise FloatingPointError(
                f"wanted finite gradients after the first step, got NaN or infinity in {name}; "
                "check the model's weights, or load it in float32"
            )
