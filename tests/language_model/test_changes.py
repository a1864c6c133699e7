"""A network goes on being changed after it was wrapped: what is kept of it never outlives what it was."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import tiny_lm, tiny_tokenizer
from torch import nn
from torch.nn.utils import parametrize

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts

PROMPTS = torch.tensor([[2, 3, 4, 5, 6, 7, 2, 3], [4, 4, 4, 5, 5, text.PAD, text.PAD, text.PAD]])
V = 8


@pytest.fixture
def lm() -> LanguageModel:
    return tiny_lm("gpt2", dtype=torch.float32, tried=False)


@torch.no_grad()
def scores(lm: LanguageModel) -> torch.Tensor:
    """What follows two prompts, and what follows each prefix of what follows them: every way of reading."""
    z = torch.arange(2 * 6 * 4).view(6, 2, 4) % (V - 1) + 1
    after = Completion(lm, text.cat(PROMPTS, text.prefixes(z, stop=0)), max_tokens=2, stop=None)
    steps = Completion(lm, PROMPTS, max_tokens=3, stop=None).token_steps()
    steps.append(z[0, :, 0])
    drawn = steps.score(z[0, :, 1])
    return torch.cat([after.log_prob(z[0, :, :2]).flatten(), drawn])


def fresh(lm: LanguageModel) -> torch.Tensor:
    """The scores with nothing kept."""
    kept = prompts(lm.network)
    capacity, kept.capacity = kept.capacity, 0
    found = scores(lm)
    kept.capacity = capacity
    return found


def assert_follows(lm: LanguageModel, before: torch.Tensor) -> None:
    now = scores(lm)
    assert (now - before).abs().max() > 1e-3
    torch.testing.assert_close(now, fresh(lm), atol=1e-5, rtol=1e-5)


def steer(lm: LanguageModel, kind: str):
    """Something that changes every pass until it is removed."""
    layer = lm.model.transformer.h[0]
    v = torch.linspace(-1, 1, 16)
    if kind == "forward hook":
        return layer.register_forward_hook(
            lambda m, args, out: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
        )
    if kind == "pre-hook":
        return layer.register_forward_pre_hook(lambda m, args: (args[0] + v, *args[1:]))
    if kind == "pre-hook with keywords":
        return layer.mlp.register_forward_pre_hook(lambda m, args, kw: ((args[0] + v,), kw), with_kwargs=True)
    if kind == "global hook":
        return nn.modules.module.register_module_forward_hook(lambda m, args, out: out + v if m is layer.mlp else out)
    if kind == "patched class":
        patch = pytest.MonkeyPatch()
        plain = type(layer.mlp).forward
        patch.setattr(type(layer.mlp), "forward", lambda self, x: plain(self, x) + v)
        patch.remove = patch.undo
        return patch
    assert kind == "patched method"
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x) + v

    class Handle:
        def remove(self) -> None:
            del layer.mlp.forward

    return Handle()


KINDS = ["forward hook", "pre-hook", "pre-hook with keywords", "global hook", "patched method", "patched class"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_reach_every_pass_and_leave_nothing(lm, kind):
    before = scores(lm)
    for _ in range(2):
        handle = steer(lm, kind)
        assert_follows(lm, before)
        handle.remove()
        torch.testing.assert_close(scores(lm), before, atol=1e-5, rtol=1e-5)


def test_a_hook_whose_effect_moves_is_asked_every_time(lm):
    before, strength = scores(lm), torch.ones(())
    lm.model.transformer.h[0].mlp.register_forward_hook(lambda m, args, out: out + strength * torch.linspace(-1, 1, 16))
    once = scores(lm)
    strength.mul_(-3)
    assert_follows(lm, once)
    assert_follows(lm, before)


def test_what_was_kept_without_hooks_is_known_after_them(lm):
    scores(lm)
    kept = len(prompts(lm.network)._kept)
    handle = steer(lm, "forward hook")
    scores(lm)
    handle.remove()
    before = lm.tokens_scored
    scores(lm)
    warm = lm.tokens_scored - before
    assert len(prompts(lm.network)._kept) == kept
    prompts(lm.network).forget()
    before = lm.tokens_scored
    scores(lm)
    assert lm.tokens_scored - before > warm


def test_facts_found_under_a_hook_are_not_the_networks(lm):
    """A hook that looks at a token's column makes packing wrong; without it packing is right again."""
    twin = tiny_lm("gpt2", dtype=torch.float32, tried=False)
    scores(twin)

    def by_column(module, args, out):
        return out + torch.arange(out.shape[1])[:, None] * torch.linspace(-1, 1, 16)

    handle = lm.model.transformer.h[0].mlp.register_forward_hook(by_column)
    scores(lm)
    steered = dict(lm.network.facts)
    handle.remove()
    torch.testing.assert_close(scores(lm), scores(twin), atol=1e-5, rtol=1e-5)
    assert lm.network.facts == twin.network.facts and not steered["tree_attention"]


def test_autocast_keeps_and_recalls_nothing():
    """In single precision: autocast leaves double alone."""
    lm = tiny_lm("gpt2", dtype=torch.float32, tried=False)
    before = scores(lm)
    with torch.autocast("cpu", torch.bfloat16):
        inside = scores(lm)
        torch.testing.assert_close(inside, fresh(lm), atol=1e-6, rtol=0)
    assert 1e-6 < (inside - before).abs().max() < 0.5
    torch.testing.assert_close(scores(lm), before, atol=1e-6, rtol=0)
    other = tiny_lm("gpt2", dtype=torch.float32, tried=False)
    with torch.autocast("cpu", torch.bfloat16):
        scores(other)
    torch.testing.assert_close(scores(other), before, atol=1e-6, rtol=0)
    assert other.network.facts == lm.network.facts


def swap(module: nn.Module, name: str, value: nn.Module) -> None:
    setattr(module, name, value)


CHANGES = {
    "a module replaced": lambda m: swap(m.transformer.h[0].mlp, "act", nn.Sigmoid()),
    "a layer replaced": lambda m: swap(m.transformer.h, "1", type(m.transformer.h[1])(m.config, 1).eval()),
    "a parameter replaced": lambda m: swap(m.transformer.ln_f, "weight", nn.Parameter(torch.linspace(0, 2, 16))),
    "a parametrization": lambda m: parametrize.register_parametrization(
        m.transformer.h[0].mlp.c_fc, "weight", nn.Tanh()
    ),
    "a buffer in place": lambda m: m.offset.add_(1.0),
    "a buffer replaced": lambda m: swap(m, "offset", torch.tensor(2.0)),
}


class Shifted(nn.Embedding):
    """Embeddings that grow with a buffer of the whole model's."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * (1 + self.whole[0].offset)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_and_buffers_are_followed(lm, change):
    lm.model.register_buffer("offset", torch.tensor(0.0))
    lm.model.transformer.wte.__class__ = Shifted
    lm.model.transformer.wte.whole = [lm.model]
    before = scores(lm)
    CHANGES[change](lm.model)
    assert_follows(lm, before)
    assert set(lm.trainable_parameters()) == set(lm.model.parameters())


def test_a_replaced_output_layer_is_what_trains_and_what_is_saved(tmp_path):
    lm = tiny_lm("llama", dtype=torch.float32)
    guide = lm.with_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        lm.model.lm_head = nn.Linear(16, V, bias=False)
    value = torch.tensor([[2, 3]])
    (gradient,) = torch.autograd.grad(
        Completion(lm, PROMPTS[:1], max_tokens=2, stop=None).log_prob(value).sum(), [lm.trainable_parameters()[-1]]
    )
    assert lm.trainable_parameters()[-1] is lm.model.lm_head.weight and gradient.any()
    loss = Completion(guide, PROMPTS[:1], max_tokens=2, stop=None).log_prob(value).sum()
    assert all(g.any() for g in torch.autograd.grad(loss, guide.trainable_parameters(), retain_graph=True))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, [lm.model.lm_head.weight])
    lm.save_pretrained(tmp_path / "base")
    again = LanguageModel.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(scores(again), scores(lm))


def test_an_adapter_whose_layers_were_replaced_is_refused():
    lm = tiny_lm("llama", dtype=torch.float32)
    guide = lm.with_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), name="guide")
    lm.model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16, bias=False)
    with pytest.raises(ValueError, match="adapter 'guide' were replaced"):
        guide.forward(PROMPTS[:1])
    assert lm.forward(PROMPTS[:1]).logits.isfinite().all()


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_resized_embeddings_are_refused_until_the_model_is_wrapped_again(arch):
    lm = tiny_lm(arch, dtype=torch.float32)
    before = Completion(lm, PROMPTS, max_tokens=3)
    lm.model.resize_token_embeddings(V + 4, mean_resizing=False)
    uses = [
        lambda: lm.vocab_size,
        lambda: lm.forward(PROMPTS[:1]),
        lambda: lm.trainable_parameters(),
        lambda: before.sample(),
        lambda: before.log_prob(torch.tensor([[2, 0]])),
        lambda: lm.with_adapter(peft.LoraConfig(r=2, target_modules="all-linear")),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"it has 12 ids, and had 8 when it was wrapped.*wrap it again"):
            use()
    again = LanguageModel(lm.model, tiny_tokenizer(V + 4))
    assert again.vocab_size == V + 4 and set(again.trainable_parameters()) == set(lm.model.parameters())
    assert scores(again).isfinite().all()
    with pytest.raises(ValueError, match="wrap it again"):
        lm.forward(PROMPTS[:1])
