"""Which linears return to the residual stream: each block's attention output and FFN down projection, by structure.

Families name them differently (``dense``, ``out_lin``, ``Wo``, ``w2``, ``fc_out``, ...). What they share: both end in
the width of the block's residual stream. An attention output is the last such linear of an attention (or other
token-mixing) module; a down projection undoes a linear of its MLP that widens the stream, or both halves of a gated
one.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import nn

from .bases.linear import is_conv1d, is_linear

#: The two roles, under the names that Llama gives them.
ROLES = ("o_proj", "down_proj")

#: Modules that mix tokens, by the name they have in their block, or by their class.
_MIXER_NAME = re.compile(r"attn|attention|mixer|mamba|ssm|lstm|recurrent|temporal|rglru|conv|delta|_att$", re.I)
_MIXER_CLASS = re.compile(r"(Attention|Attn|Mixer)$")
_NO_MIXER_CLASS = re.compile(r"(Norm|MLP|Mlp|MoE|Moe|MoeBlock|MoEBlock|FeedForward|FFN|Experts?)$")
#: How families name the last linear of attention, where more than one ends in the residual width.
_OUTPUT_NAME = re.compile(r"(^|[._])(o|wo|out|output|dense|final)([._]|$)(?!gate)|\.proj$", re.I)
#: Where configs say how wide a residual stream is.
_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")


#: Names that usually have a role, for blocks in which structure shows none, and for models without lists of blocks.
NAME_PATTERNS = {
    "o_proj": r"(?:.*\.)?(?:o_proj|out_proj|attn\.c_proj|attention\.output\.dense|SelfAttention\.o|EncDecAttention\.o)",
    "down_proj": r"(?:.*\.)?(?:down_proj|mlp\.c_proj|fc2|DenseReluDense\.wo|(?<!attention\.)output\.dense)",
}


def role_by_name(name: str) -> str | None:
    """The role that a linear of this name usually plays, or None."""
    for role, pattern in NAME_PATTERNS.items():
        if re.fullmatch(pattern, name):
            return role
    return None


def widths(linear: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear, whatever its layout or storage."""
    if is_conv1d(linear):
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def roles(model: nn.Module) -> dict[str, str]:
    """The linears of ``model`` that play a role, by name: "o_proj" or "down_proj"."""
    modules = dict(model.named_modules())
    configured = _configured_widths(getattr(model, "config", None))
    found: dict[str, str] = {}
    for block, names in _by_block(modules).items():
        found.update(_roles_in(block, names, modules, configured))
    if not found:
        found = _by_name([name for name, module in modules.items() if is_linear(module)])
    return {name: found[name] for name in modules if name in found}


def _configured_widths(config: Any) -> set[int]:
    """Widths of residual streams that a config and its parts name."""
    values = dict(vars(config)) if hasattr(config, "__dict__") else {}
    found = {getattr(config, key, None) for key in _WIDTH_KEYS}
    for part in values.values():
        if hasattr(part, "to_dict"):
            found |= _configured_widths(part)
    return {width for width in found if isinstance(width, int)}


def _by_block(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Names of the linears inside each element of an innermost ``nn.ModuleList``."""
    blocks: dict[str, list[str]] = {}
    for name, module in modules.items():
        if is_linear(module) and (block := _block_of(name, modules)) is not None:
            blocks.setdefault(block, []).append(name)
    return blocks


def _block_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    for depth in range(len(parts) - 2, 0, -1):
        if isinstance(modules.get(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return None


def _roles_in(block: str, names: list[str], modules: dict[str, nn.Module], configured: set[int]) -> dict[str, str]:
    shapes = {name: widths(modules[name]) for name in names}
    width = _residual_width(block, list(shapes.values()), modules, configured)
    mixers: dict[str, list[str]] = {}
    others = []
    for name in names:
        mixer = _mixer_of(name, block, modules)
        if mixer is None:
            others.append(name)
        else:
            mixers.setdefault(mixer, []).append(name)
    found = {}
    for mixer, members in mixers.items():
        ends = [name for name in members if shapes[name][1] == width] or members
        named = [name for name in ends if _OUTPUT_NAME.search(name.rpartition(mixer)[2])]
        if len(members) > 1 and (named or ends is not members):
            found[(named or ends)[-1]] = "o_proj"
    found.update(dict.fromkeys(_down_projections(others, shapes, width), "down_proj"))
    there = set(found.values())
    return {**{name: role for name, role in _by_name(names).items() if role not in there}, **found}


def _by_name(names: list[str]) -> dict[str, str]:
    return {name: role for name in names if (role := role_by_name(name)) is not None}


def _residual_width(
    block: str, shapes: list[tuple[int, int]], modules: dict[str, nn.Module], configured: set[int]
) -> int:
    """The width that most linears of the block read or write, of those that the config names and the block normalizes
    where they do."""
    normed = {
        weight.numel()
        for name, module in modules.items()
        if name.startswith(f"{block}.") and "norm" in type(module).__name__.lower()
        if (weight := getattr(module, "weight", None)) is not None and not _is_mixer(block, modules)
    }
    counts = Counter(width for shape in shapes for width in shape)

    def rank(width: int) -> tuple:
        is_normed, is_configured = width in normed, width in configured
        return is_normed and is_configured, is_normed, is_configured, counts[width], width == shapes[0][0]

    return max(counts, key=rank)


def _is_mixer(block: str, modules: dict[str, nn.Module]) -> bool:
    """True where a block is itself attention: some models keep attention and MLPs in lists of their own."""
    of = block.rpartition(".")[0].rpartition(".")[2]
    return bool(re.search("attn|attention", of, re.I) or _MIXER_CLASS.search(type(modules[block]).__name__))


def _mixer_of(name: str, block: str, modules: dict[str, nn.Module]) -> str | None:
    """The outermost token-mixing module of ``block`` that holds the linear ``name``, maybe the block itself."""
    if name != block and _is_mixer(block, modules):
        return block
    parts = name[len(block) + 1 :].split(".")
    for depth in range(1, len(parts)):
        path = f"{block}.{'.'.join(parts[:depth])}"
        kind = type(modules[path]).__name__
        if _NO_MIXER_CLASS.search(kind):
            continue
        if _MIXER_NAME.search(parts[depth - 1]) or _MIXER_CLASS.search(kind):
            return path
    return None


def _down_projections(names: list[str], shapes: dict[str, tuple[int, int]], width: int) -> list[str]:
    """Linears that end in the residual width and read what another made of it: one before them, or a sibling (some
    declare ``w2`` before ``w3``). A gated MLP may have both halves of its inner width in one linear. Square linears
    are told apart by name where one has a telling one."""
    found = []
    named = [name for name in names if role_by_name(name) == "down_proj"]
    for place, name in enumerate(names):
        inner, out = shapes[name]
        parent = name.rpartition(".")[0]
        widening = {other for other in names if other != name and shapes[other] in ((width, inner), (width, 2 * inner))}
        before = widening & set(names[:place])
        siblings = {other for other in widening if other.rpartition(".")[0] == parent and inner != width}
        if out == width and (before or siblings) and not (inner == width and named and name not in named):
            found.append(name)
    return found
