"""Activation functions that transformers computes by many operations, replaced by torch's single one."""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation


def fuse_activations(model: nn.Module) -> None:
    r"""Replaces ``gelu_new`` and ``gelu_fast`` in ``model`` by torch's own, in place; equal up to rounding.

    .. math:: \tfrac{x}{2} \left(1 + \tanh\left(\sqrt{2 / \pi}\, (x + 0.044715\, x^3)\right)\right)

    Eight passes over memory become one, and the backward pass keeps x instead of what the eight operations need. The
    configuration and checkpoints do not change.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
