"""PEFT runs inlay: fused linears under a stock ``LoraConfig``, and S²FT as a method of PEFT's own.

Importing this registers ``S2FTConfig`` with PEFT; ``import inlay`` alone does not import PEFT.

Raises:
    ImportError: PEFT is not installed, or its internals moved; the message says what was expected.
"""

from __future__ import annotations

from torch import nn

from ...nn.blocks import install_blocks
from .config import S2FTConfig
from .lora import accelerate_lora
from .tuner import S2FTModel


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Fuse norms, gated MLPs and attention of a plain model, in place, where they are proven to compute the same.

    For PEFT methods other than ``S2FTConfig``, which does so itself. To be called before ``get_peft_model``: a module
    is compared with the fused one while its linears are still plain. Returns ``model``.
    """
    install_blocks(model)
    return model


__all__ = ["S2FTConfig", "S2FTModel", "accelerate_lora", "fuse_blocks"]
