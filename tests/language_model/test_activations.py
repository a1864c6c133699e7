"""One operation for an activation function that transformers writes as eight: the same function and checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import tiny_tokenizer
from transformers.activations import ACT2FN, GELUTanh

from lmppl import LanguageModel
from lmppl.activations import fuse_activations

FUSED = ["gelu_new", "gelu_fast"]


def gpt2(activation: str, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=32, activation_function=activation,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.5,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def kept_for_backward(module: torch.nn.Module, x: torch.Tensor) -> int:
    """How many distinct tensors the backward pass keeps."""
    kept: set[int] = set()
    tensors: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        tensors.append(t)
        kept.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    return len(kept)


@pytest.mark.parametrize("activation", FUSED)
def test_the_function_is_the_same(activation):
    """Values, first and second derivatives on a grid, to 1e-9: transformers rounds sqrt(2/pi)."""
    model = torch.nn.Sequential(ACT2FN[activation])
    fused = copy.deepcopy(model)
    fuse_activations(fused)
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64, requires_grad=True)
    for function in (model, fused):
        y = function(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        found = torch.stack([y, first, second]).detach()
        if function is model:
            expected = found
    assert (found - expected).abs().max() < 1e-9
    assert kept_for_backward(fused, x) == 1 < kept_for_backward(model, x)


@pytest.mark.parametrize("activation", FUSED)
def test_a_wrapped_network_computes_what_it_did(activation, tmp_path):
    plain = gpt2(activation)
    lm = LanguageModel(copy.deepcopy(plain), tiny_tokenizer())
    ids = torch.randint(8, (3, 9), generator=torch.Generator().manual_seed(0))
    assert (lm.forward(ids).logits - plain(ids).logits).abs().max() < 1e-9
    assert {type(block.mlp.act) for block in lm.model.transformer.h} == {torch.nn.GELU}
    lm.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.activation_function == activation
    assert {type(block.mlp.act) for block in again.transformer.h} == {type(ACT2FN[activation])}
    assert torch.equal(again(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "gelu_pytorch_tanh", "quick_gelu"])
def test_other_functions_are_left_alone(activation):
    model = gpt2(activation)
    before = [block.mlp.act for block in model.transformer.h]
    fuse_activations(model)
    assert [block.mlp.act for block in model.transformer.h] == before


def test_transformers_own_fused_function_is_the_same():
    x = torch.linspace(-12, 12, 2001)
    assert torch.equal(GELUTanh()(x), torch.nn.GELU(approximate="tanh")(x))
