"""The ops: each file has one op's checks, plain-torch reference, autograd and torch.library registration."""

from inlay.ops._registry import force_path
from inlay.ops.adamw import adamw_8bit_step_, adamw_step_
from inlay.ops.adamw_bf16 import adamw_8bit_bf16_step_, adamw_bf16_step_
from inlay.ops.attention import attention
from inlay.ops.base_products import DenseBase, DenseBaseT
from inlay.ops.causal_conv1d import causal_conv1d
from inlay.ops.cross_entropy import linear_cross_entropy
from inlay.ops.gated_delta_rule import gated_delta_rule
from inlay.ops.rms_norm import rms_norm
from inlay.ops.rope import rope
from inlay.ops.scale_shift import scale_shift
from inlay.ops.submatrix import submatrix_write_
from inlay.ops.submatrix_linear import submatrix_add_delta, submatrix_linear, submatrix_linear_in_place
from inlay.ops.swiglu import swiglu, swiglu_linear, swiglu_submatrix_linear

__all__ = [
    "DenseBase",
    "DenseBaseT",
    "adamw_8bit_bf16_step_",
    "adamw_8bit_step_",
    "adamw_bf16_step_",
    "adamw_step_",
    "attention",
    "causal_conv1d",
    "force_path",
    "gated_delta_rule",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "scale_shift",
    "submatrix_add_delta",
    "submatrix_linear",
    "submatrix_linear_in_place",
    "submatrix_write_",
    "swiglu",
    "swiglu_linear",
    "swiglu_submatrix_linear",
]
