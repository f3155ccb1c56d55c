"""What a user has in hand after ``tune`` or ``load``: the same object and class, plus adapters."""

from __future__ import annotations

from torch import Tensor, nn

from .adapters.combine import add_weighted_adapter
from .adapters.load import hotswap, load_onto
from .adapters.save import save_adapter
from .coverage import coverage_table
from .nn.mixed import Mixed, mix
from .sharding import any_sharded
from .state import TuneState, activate, check_in_place, forget, require_state, switch_off, switch_on


class TunedModel(Mixed):
    """Methods a tuned model gains. ``tune`` mixes this into the model's own class."""

    inlay_state: TuneState

    def print_trainable_parameters(self) -> None:
        """Print trainable and total parameter counts, PEFT's line."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def print_tuned_modules(self) -> None:
        """Print every kind of weight with its base and how many of it are tuned; see :mod:`inlay.coverage`."""
        print(coverage_table(self))

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        delta: bool = False,
        **kwargs,
    ) -> None:
        """Write the active adapter to ``save_directory``; with ``delta=True`` only the rows that training changed of
        tensors trained whole. See :func:`inlay.adapters.save_adapter`."""
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True: inlay writes adapters to disk and contacts no service; save to a folder, then "
                "upload it with huggingface_hub's upload_folder"
            )
        if is_main_process or (state_dict is None and any_sharded(self)):  # which every process has to gather
            save_adapter(self, save_directory, state_dict=state_dict, delta=delta)

    def train(self, mode: bool = True) -> nn.Module:
        """As ``nn.Module.train``; ValueError if an in-place delta's base has been sharded since."""
        if mode:
            check_in_place(self)
        return super().train(mode)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the active, trainable ones; the others stay loaded, frozen."""
        activate(self, (adapter_name,) if isinstance(adapter_name, str) else adapter_name)

    def set_padding_free(self, mode: bool | str) -> None:
        """Whether training drops the padding of batches: "auto" (where it is proven that samples of one row run by
        their lengths), True (or an error) or False; see :mod:`inlay.integrations.padding_free`."""
        require_state(self, "set_padding_free").padding_free.set(mode)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(require_state(self, "active_adapters").active)

    def disable_adapters(self) -> None:
        """Behave as the base model until :meth:`enable_adapters` or :meth:`set_adapter`."""
        switch_off(self)

    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        switch_on(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter that is not active."""
        forget(self, adapter_name)

    def load_adapter(self, directory: str, adapter_name: str = "default", **kwargs) -> None:
        """Add the adapter in ``directory`` under ``adapter_name``; see :func:`inlay.load`."""
        load_onto(self, directory, name=adapter_name, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the weighted sum of ``adapters``; see :func:`inlay.adapters.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name)

    def hotswap_adapter(self, directory: str, adapter_name: str = "default") -> None:
        """Put the values of the adapter in ``directory`` into a loaded one; see :func:`inlay.adapters.hotswap`."""
        hotswap(self, directory, adapter_name)


def with_methods(model: nn.Module) -> nn.Module:
    """Give a tuned ``model`` the methods of :class:`TunedModel`, once."""
    return model if isinstance(model, TunedModel) else mix(model, TunedModel)
