"""Activation functions that transformers writes as many operations, in the one operation that computes them."""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation


def fuse_activations(model: nn.Module) -> None:
    r"""Let ``model`` compute its `gelu_new` and `gelu_fast` by torch's own, in place; the same function up to rounding.

    .. math:: \tfrac{x}{2} \left(1 + \tanh\left(\sqrt{2 / \pi}\, (x + 0.044715\, x^3)\right)\right)

    Eight passes over memory become one, and the backward pass keeps x instead of what the eight need.  Configuration
    and checkpoints stay what they are.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
