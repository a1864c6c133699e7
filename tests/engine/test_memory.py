"""Memory of a pass with gradient: bounded by the token budget, at the price of computing again what exceeds it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packing import packing, spied, stopped_prefixes
from peft import LoraConfig
from tiny import adapter, tiny_lm
from torch.profiler import ProfilerActivity, profile

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.engine import reading, unembedding
from lmppl.engine.again import activations, kept_tokens
from lmppl.engine.tuning import TUNING
from lmppl.language_model import TOKEN_BUDGET

V, BUDGET = 6, 60
PROMPT = torch.tensor([[2, 3, 4], [4, 5, text.PAD]])


def loss(*views: LanguageModel) -> torch.Tensor:
    """Of every view: a stop after each prefix, an observation after each, and a text whose temperature is learned."""
    g = torch.Generator().manual_seed(0)
    z = torch.randint(1, V, (4, 2, 5), generator=g)
    z[1, 0, 3:] = text.PAD
    z = text.cat(z, torch.tensor([0]))
    total = torch.zeros((), dtype=torch.float64)
    for i, view in enumerate(views):
        log_probs, stops = Completion(view, PROMPT, max_tokens=5).prefix_scores(z)
        after = Completion(view, stopped_prefixes(PROMPT, z), max_tokens=3).log_prob(torch.tensor([3, 2, 0]))
        finite = (x[x > -torch.inf].mean() for x in (log_probs, stops))
        total = total + (i + 1) * (sum(finite) + after.mean())
    return total


def gradients(views: list[LanguageModel]) -> list[torch.Tensor]:
    parameters = [p for view in views for p in view.trainable_parameters()]
    found = torch.autograd.grad(loss(*views), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def budgeted(views: list[LanguageModel], budget: int) -> None:
    for view in views:
        view.token_budget = budget


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def three_views(**kwargs) -> list[LanguageModel]:
    lm = tiny_lm("gpt2", vocab=V, dtype=torch.float64, **kwargs)
    views = [adapter(lm, 1), adapter(lm, 2), lm]
    reading.supports_trees(lm), unembedding.splits(lm)
    return views


@pytest.mark.parametrize("layers", [False, True], ids=["", "layers again"])
@pytest.mark.parametrize("head", ["apart", "in chunks", "inseparable"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_parts_computed_again_give_the_gradient_of_the_whole(packed, head, layers, monkeypatch):
    """Two adapters and the base in one loss, in float64; each pass, the backward pass's too, within the budget."""
    views = three_views()
    lm = views[-1]
    if head == "in chunks":
        monkeypatch.setattr(TUNING, "many_logits", 0)
        monkeypatch.setattr(TUNING, "logits_at_once", 10 * V)
    lm.network.facts["split_head"] = head != "inseparable"
    with packing(packed):
        expected = gradients(views)
        if layers:
            lm.model.activation_checkpointing_enable()
        budgeted(views, BUDGET)
        with spied(lm) as sizes:
            value = loss(*views)
    before = lm.tokens_scored
    parameters = [p for view in views for p in view.trainable_parameters()]
    budgeted(views, 7)  # nor does packing matter any more: parts are read as they were read
    for _ in range(2):
        with spied(lm) as again:
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        assert_same([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)], expected)
        assert max(sizes + again) <= BUDGET and again
    assert 0 < lm.tokens_scored - before <= 2 * sum(sizes)


@pytest.mark.parametrize("case", ["hook", "autocast", "temperature", "output layer"])
def test_gradients_where_the_graph_is_no_function_of_the_parameters_alone(case, monkeypatch):
    """A hook that changes a weight's gradient, once; mixed precision; a temperature that is learned; no state's."""
    views = three_views()[:1]
    if case == "output layer":  # its adapter's gradient is all there is, and the hidden states have none
        views = [views[0].with_adapter(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))]
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    parameters = [*views[0].trainable_parameters(), temperature]
    for p in parameters if case == "hook" else ():
        p.register_hook(lambda g: 3 * g.tanh())
    if case == "autocast":
        views[0].model.float()
    z = text.cat(torch.randint(1, V, (30, 2, 5), generator=torch.Generator().manual_seed(0)), torch.tensor([0]))
    found = []
    for budget in (10_000, BUDGET):
        budgeted(views, budget)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            value = Completion(views[0], PROMPT, max_tokens=5, temperature=temperature).log_prob(z).mean()
        before = views[0].tokens_scored
        found.append(torch.autograd.grad(value, parameters))
        assert (views[0].tokens_scored > before) == (budget == BUDGET)
    assert_same(found[1], found[0], 0.03 if case == "autocast" else 1e-10)


def test_what_the_budget_holds_is_kept_and_what_exceeds_it_computed_once_more():
    """Of 64 texts of 3 + 6 tokens as many as fit, the last ones; the rest go through the network again."""
    view = adapter(tiny_lm("gpt2", vocab=V), 0)
    z = text.cat(torch.randint(1, V, (64, 1, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([0]))
    d = Completion(view, PROMPT[:1], max_tokens=6)
    counts = {}
    for budget in (10_000, 1000, 200, 70):
        view.token_budget = budget
        d.log_prob(z)
        before = view.tokens_scored
        value = d.log_prob(z).sum()
        once = view.tokens_scored - before
        value.backward()
        counts[budget] = view.tokens_scored - before - once
        assert max(0, once - budget) <= counts[budget] <= once
    assert counts[10_000] == counts[1000] == 0 < counts[200] < counts[70] < once


def peak(run: Callable[[], object], trace: Path) -> int:
    """The most bytes that the tensors made by a run had at once, as torch's allocator counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = torch.tensor([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])])
    return int(changes.cumsum(0).max())


def test_activations_are_kept_of_as_many_tokens_as_memory_is_given(monkeypatch):
    """What a token leaves is counted of each view: half of the layers adapted leave about half, none the least."""
    lm = tiny_lm("llama", vocab=V, layers=4)
    names = [f"layers.{i}.{name}" for i in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")]
    both, upper = (lm.with_adapter(LoraConfig(r=2, target_modules=some)) for some in (names, names[4:]))
    each, fewer, upper_name = activations(both), activations(upper), upper.adapter_name
    assert 0.4 * each < fewer < 0.6 * each
    monkeypatch.setattr(TUNING, "activations", 40 * each)
    assert kept_tokens(both) == 40
    assert kept_tokens(upper) == 40 * each // fewer
    both.token_budget = TOKEN_BUDGET // 4
    assert kept_tokens(both) == 10
    both.token_budget = 8
    assert kept_tokens(both) == 1  # never none
    lm.remove_adapter(upper)
    again = lm.with_adapter(LoraConfig(r=2, target_modules=names), name=upper_name)
    assert activations(again) == each


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_is_left_of_a_network_that_nobody_holds(family):
    def train() -> None:
        view = adapter(tiny_lm(family, vocab=V, dtype=torch.float64), 1)
        loss(view).backward()
        assert activations(view) > 0

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    train()  # what a first one loads
    before = tensors()
    train()
    assert tensors() <= before


def test_activations_are_counted_where_a_context_holds_less():
    assert activations(adapter(tiny_lm("gpt2", vocab=V, max_length=4), 0)) > 0


@pytest.mark.parametrize("head", [True, False])
def test_little_memory_for_activations_changes_no_gradient(head, monkeypatch):
    views = three_views()
    monkeypatch.setattr(TUNING, "many_logits", 0 if head else 2**40)
    expected = gradients(views)
    monkeypatch.setattr(TUNING, "activations", 1)
    monkeypatch.setattr(TUNING, "cache", 0)
    monkeypatch.setattr(TUNING, "fewest", 8)
    with spied(views[0]) as passes:
        assert_same(gradients(views), expected)
    assert len(passes) > 10


def test_memory_does_not_grow_with_particles_beyond_the_budget(tmp_path):
    lm = tiny_lm("gpt2", vocab=26, dtype=torch.float32)
    view = adapter(lm, 0)
    d = Completion(view, PROMPT[:1], max_tokens=8, min_tokens=8)
    found = {}
    for budget in (10_000, 300):
        view.token_budget = budget
        for particles in (32, 512):
            z = d.sample((particles,))

            def step(z: torch.Tensor = z) -> None:
                torch.autograd.grad(d.prefix_scores(z).log_probs[..., -1].sum(), view.trainable_parameters())

            step()
            found[budget, particles] = peak(step, tmp_path / "trace.json")
    growth = {budget: found[budget, 512] - found[budget, 32] for budget in (10_000, 300)}
    assert growth[10_000] > 10 * found[10_000, 32]
    tokens = (512 - 32) * 9
    # Bytes: hidden states and mean weights, 64 a token each; texts and indices, some numbers of 8 a token.
    assert growth[300] < 240 * tokens
    assert growth[10_000] > 2500 * tokens


def test_memory_grows_little_with_a_prompt_that_alone_exceeds_the_budget(tmp_path, monkeypatch):
    """Of 300 tokens that 8 texts continue each layer's input is kept, and scores of a few queries at a time."""
    view = adapter(tiny_lm("llama", vocab=26, layers=6, max_length=512, dtype=torch.float32), 0)
    z = torch.randint(1, 26, (8, 6), generator=torch.Generator().manual_seed(0))
    found = {}
    for bounded in (False, True):
        if bounded:
            monkeypatch.setattr(TUNING, "activations", 100 * activations(view))
            monkeypatch.setattr(TUNING, "scores", 2**13)
        for tokens in (30, 300):
            prompt = torch.arange(tokens) % 25 + 1
            d = Completion(view, prompt, max_tokens=6, min_tokens=6, stop=None)

            def step(d: Completion = d) -> None:
                with packing(True):
                    torch.autograd.grad(d.log_prob(z).sum(), view.trainable_parameters())

            step()
            found[bounded, tokens] = peak(step, tmp_path / "trace.json")
    assert found[True, 300] < 0.3 * found[False, 300]
    assert found[True, 30] == found[False, 30]  # which fits


def test_a_forward_that_somebody_put_on_a_layer_is_computed_again_and_stays(monkeypatch):
    """As libraries that move weights do: twice in a step, with the backward pass; and there afterwards."""
    view, _, lm = three_views()
    layer, calls = lm.model.transformer.h[1], []
    forward = layer.forward

    def noted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    layer.forward = noted
    expected = gradients([view])
    calls.clear()
    monkeypatch.setattr(TUNING, "activations", 1)
    assert_same(gradients([view]), expected)
    assert layer.forward is noted and len(calls) == 2


def test_logits_of_all_cache_sized_parts_together_are_bounded(tmp_path, monkeypatch):
    """Within the token budget too: 2^16 of them are kept, however many parts have made them."""
    lm = tiny_lm("gpt2", vocab=26, dtype=torch.float32)
    lm.model.resize_token_embeddings(2048, mean_resizing=False)
    view = adapter(LanguageModel(type(lm.model)(lm.model.config), lm.tokenizer), 0)
    d = Completion(view, PROMPT[:1], max_tokens=4, min_tokens=4, temperature=2.0)  # which wants the logits
    monkeypatch.setattr(TUNING, "cache", 0)
    monkeypatch.setattr(TUNING, "fewest", 24)
    monkeypatch.setattr(TUNING, "logits_at_once", 2**16)
    z = d.sample((64,))  # 4 x 64 positions of 2,048 words have 8 times as many

    def step() -> None:
        with packing(True):
            torch.autograd.grad(d.log_prob(z).sum(), view.trainable_parameters())

    step()
    bounded = peak(step, tmp_path / "trace.json")
    monkeypatch.setattr(TUNING, "logits_at_once", 2**30)
    assert peak(step, tmp_path / "trace.json") - bounded > 4 * (4 * 64 * 2048 - 2**17)
