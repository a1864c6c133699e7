"""Layers in fewer operations: the same function and gradient as those of transformers and PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora import layer as lora
from tiny import tiny_lm
from torch import nn

from lmppl import layers
from lmppl.layers import COLUMNS, WIDE, Wide

R = 3


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_blocks_of_columns_are_the_product(shape):
    plain = nn.Linear(5, 2 * COLUMNS + 7, bias=False, dtype=torch.float64)
    wide = copy.deepcopy(plain)
    wide.__class__ = Wide
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), plain(x))
    a, b = (torch.autograd.grad(layer(x).square().sum(), layer.weight)[0] for layer in (wide, plain))
    torch.testing.assert_close(a, b)


def test_an_output_layer_of_many_words_is_wide():
    assert type(tiny_lm(vocab=7).model.lm_head) is nn.Linear
    lm = tiny_lm("llama", vocab=7)
    lm.model.resize_token_embeddings(WIDE, mean_resizing=False)
    layers.widen_output(lm.model)
    assert type(lm.model.lm_head) is Wide


def adapted(**config):
    lm = tiny_lm("llama", vocab=7, dtype=torch.float64)
    return lm.with_adapter(peft.LoraConfig(r=R, lora_alpha=5, init_lora_weights=False, **config))


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_an_adapter_is_pefts(config, monkeypatch):
    """In float64, values and gradients; what is more than two factors is PEFT's own."""
    view = adapted(target_modules="all-linear", **config)
    ids, found = torch.arange(1, 7).view(2, 3), []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(layers.Linear, "forward", lora.Linear.forward)
        logits = view(ids).logits
        found.append((logits, torch.autograd.grad(logits.square().sum(), view.trainable_parameters())))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_hook_on_a_factor_is_called():
    view = adapted(target_modules=["q_proj"])
    called = []
    factor = next(m for m in view.model.modules() if isinstance(m, lora.Linear)).lora_A
    next(iter(factor.values())).register_forward_hook(lambda *args: called.append(1))
    view(torch.tensor([[1, 2]]))
    assert called
