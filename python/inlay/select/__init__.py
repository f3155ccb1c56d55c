"""Selectors: score channels and return indices (WHERE)."""

from .activation import activation_scores
from .channels import expand_groups, pick_groups
from .gates import gate_gradients
from .gradient import gradient_scores
from .random import generator_of, random_groups
from .salience import salience_scores
from .weight import weight_scores

__all__ = [
    "activation_scores",
    "expand_groups",
    "gate_gradients",
    "generator_of",
    "gradient_scores",
    "pick_groups",
    "random_groups",
    "salience_scores",
    "weight_scores",
]
