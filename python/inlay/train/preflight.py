"""The longest batch first: what would run out of memory hours into a run does so before its first step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class Preflight(TrainerCallback):
    """Forward and backward of the longest samples before training; gradients are dropped, random numbers put back."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        data, size = self.trainer.train_dataset, args.train_batch_size
        longest = sorted(range(len(data)), key=lambda i: data.lengths[i])[-size:]
        batch = self.trainer.data_collator([data[i] for i in longest])
        shape = "{} x {} tokens".format(*batch["input_ids"].shape)
        model = self.trainer.model
        mode = model.training
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            try:
                self._run(model.train(), batch)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(
                    f"the longest batch of this run, {shape}, does not fit in memory ({error}); lower "
                    "per_device_train_batch_size or max_length, or set gradient_checkpointing=True"
                ) from error
            finally:
                model.zero_grad(set_to_none=True)
                model.train(mode)
        print(f"inlay: the longest batch of this run ({shape}) fits")

    def _run(self, model: Any, batch: dict[str, torch.Tensor]) -> None:
        inputs = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(model, inputs)
        loss.backward()
