"""Linear layers that compute the same as those of transformers and PEFT, in fewer or faster operations."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

WIDE = 16_384  # with so many outputs or more, a single product is slow on a processor
COLUMNS = 1024  # the number of outputs in a block


def widen_output(model: Any) -> None:
    """Makes the output layer of ``model`` a `Wide`, in place, if it is a plain one with a very large vocabulary."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None and head.out_features >= WIDE:
        head.__class__ = Wide


def fuse_adapters(model: nn.Module) -> None:
    """Makes every LoRA of a linear layer in ``model`` a `Linear` of this module, in place."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = Linear


class Wide(nn.Linear):
    """A linear layer that a processor computes in blocks of outputs if no gradient is needed.

    A single product of a few rows with 50,000 columns reaches a third of the speed of large products; blocks of it
    reach two thirds.
    """

    def forward(self, input: Tensor) -> Tensor:
        plain = type(self.weight) is nn.Parameter and input.device.type == "cpu"
        if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        out = rows.new_empty(len(rows), self.out_features)
        for weight, columns in zip(self.weight.split(COLUMNS), out.split(COLUMNS, 1), strict=True):
            torch.mm(rows, weight.T, out=columns)
        return out.view(*input.shape[:-1], self.out_features)


class Linear(lora.Linear):  # PEFT recognises its layers by this name
    r"""PEFT's LoRA of a linear layer, in three matrix products.

    .. math:: W x + s\, B A x

    Other cases (several adapters at once, variants, biases, hooks, other types) are left to PEFT. If ``whole`` is set
    to a weight that `merge` returned, one product is enough.
    """

    whole: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.whole is not None:
            return linear(x, self.whole.T if self.fan_in_fan_out else self.whole, self.base_layer.bias)
        if args or kwargs or self.merged_adapters:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if self._disable_adapters:
            return self.base_layer(x)
        pair = self._factors(x)
        if pair is None:
            return super().forward(x)
        down, up, scaling = pair
        out = self.base_layer(x)
        low = linear(x, down)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.T, alpha=scaling).view_as(out)

    @property
    def mergeable(self) -> bool:
        """Whether the layer is W + s B A, where W is a plain weight of the same type."""
        plain = type(self.base_layer) in (nn.Linear, Conv1D) and type(self.base_layer.weight) is nn.Parameter
        off = self._disable_adapters or self.merged_adapters
        return plain and not off and self._factors(self.base_layer.weight) is not None

    def merge(self, out: Tensor | None) -> Tensor:
        """Returns W + s B A in the layout of W, written to ``out`` if that fits."""
        weight = self.base_layer.weight
        down, up, scaling = cast(tuple[Tensor, Tensor, float], self._factors(weight))
        if out is not None and (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
            out = None
        left, right = (down.T, up.T) if self.fan_in_fan_out else (up, down)
        return torch.addmm(weight, left, right, alpha=scaling, out=out)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """Returns A, B and s of the only active adapter, if the adapter consists of these only; else None."""
        names = self._active_adapter
        if len(names) != 1 or (name := names[0]) in self.lora_variant or name not in self.lora_A:
            return None
        if self.training or x.dim() < 2 or torch.is_autocast_enabled(x.device.type):
            return None
        both = self.lora_A[name], self.lora_B[name]
        for m in both:
            if type(m) is not nn.Linear or m.bias is not None or m._forward_hooks or m._forward_pre_hooks:
                return None
            if type(m.weight) is not nn.Parameter or m.weight.dtype != x.dtype:
                return None
        return both[0].weight, both[1].weight, self.scaling[name]
