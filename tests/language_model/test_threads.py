"""Several threads with views of one network: each gets what it would get alone."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from tiny import adapter, tiny_lm

from lmppl import LanguageModel, text
from lmppl.distributions import Completion

PROMPTS = torch.tensor([[2, 3, 4, 5], [4, 4, 4, text.PAD]])
V = 8


def views(tried: bool = True) -> list[LanguageModel]:
    lm = tiny_lm("llama", dtype=torch.float64, tried=tried)
    return [lm, adapter(lm, 1), adapter(lm, 2)]


def together(*tasks, times: int = 25) -> list[list]:
    """What each task returns each time, all of them at once."""
    start = Barrier(len(tasks))

    def run(task):
        start.wait()
        return [task() for _ in range(times)]

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [f.result() for f in [pool.submit(run, task) for task in tasks]]


def scores(view: LanguageModel) -> torch.Tensor:
    """Texts and packed prefixes, what follows them."""
    z = torch.arange(2 * 6 * 4).view(6, 2, 4) % (V - 1) + 1
    with torch.no_grad():
        after = Completion(view, text.cat(PROMPTS, text.prefixes(z, stop=0)), max_tokens=2, stop=None)
        after = after.log_prob(z[0, :, :2])  # (P, 6, 2)
        return torch.cat([Completion(view, PROMPTS, max_tokens=4).prefix_log_probs(z), after.permute(1, 2, 0)], -1)


def gradient(view: LanguageModel) -> list[torch.Tensor]:
    z = torch.arange(2 * 40 * 4).view(40, 2, 4) % (V - 1) + 1
    loss = Completion(view, PROMPTS, max_tokens=4, stop=None).log_prob(z).sum()
    return [*torch.autograd.grad(loss, view.trainable_parameters())]


def assert_each(found: list, expected) -> None:
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-9)


def test_scores_are_those_of_each_view_alone():
    all_views = views()
    for found, view in zip(together(*(lambda v=v: scores(v) for v in all_views)), all_views, strict=True):
        assert_each(found, scores(view))


def test_facts_found_by_several_at_once_are_right():
    """Each thread meets a network that nothing is known of."""
    for _ in range(5):
        fresh = views(tried=False)
        found = together(*(lambda v=v: scores(v) for v in fresh), times=1)
        known = views(tried=False)
        for view in known:
            scores(view)
        for (each,), view in zip(found, known, strict=True):
            assert_each([each], scores(view))
        assert fresh[0].network.facts == known[0].network.facts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [16_384, 40])
def test_gradients_are_those_of_each_view_alone(budget, checkpointing):
    """The base and an adapter train, another scores; what exceeds the budget is read again in the backward pass."""
    base, one, two = views()
    if checkpointing:
        base.model.activation_checkpointing_enable()
    for view in (base, one):
        view.token_budget = budget
    expected = gradient(base), gradient(one), scores(two)
    found = together(lambda: gradient(base), lambda: gradient(one), lambda: scores(two), times=8)
    for each, alone in zip(found, expected, strict=True):
        assert_each(each, alone)


def test_what_the_base_accumulates_is_whole_while_an_adapter_runs():
    """`backward` into `.grad`: none of it is lost to a pass that gives the base no gradient."""
    base, one, _ = views()
    expected = gradient(base)

    def accumulate() -> list[torch.Tensor]:
        for p in base.trainable_parameters():
            p.grad = None
        z = torch.arange(2 * 40 * 4).view(40, 2, 4) % (V - 1) + 1
        Completion(base, PROMPTS, max_tokens=4, stop=None).log_prob(z).sum().backward()
        return [p.grad.clone() for p in base.trainable_parameters()]

    for each in together(accumulate, lambda: gradient(one))[0]:
        assert_each([each], expected)


def test_draws_are_those_of_each_view_alone():
    """Steps that take turns, token by token, in an order that is forced."""
    base, one, _ = views()
    uniform = torch.rand(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def drawn(view: LanguageModel, mine: Event | None = None, other: Event | None = None) -> torch.Tensor:
        steps = Completion(view, PROMPTS, max_tokens=5, stop=None).token_steps()
        found = []
        for u in uniform:
            if mine is not None:
                mine.wait()
                mine.clear()
            token, log_prob = steps.draw(u)
            steps.append(token)
            found.append(log_prob)
            if other is not None:
                other.set()
        return torch.stack(found)

    alone = drawn(base), drawn(one)
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    events = Event(), Event()
    events[0].set()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(drawn, view, events[i], events[1 - i]) for i, view in enumerate((base, one))]
        for future, expected in zip(futures, alone, strict=True):
            assert_each([future.result()], expected)


def test_tokens_are_counted_once_each():
    all_views = views()
    for view in all_views:
        scores(view)
    before = all_views[0].tokens_scored
    for view in all_views:
        scores(view)
    alone = all_views[0].tokens_scored - before
    together(*(lambda v=v: scores(v) for v in all_views), times=10)
    assert all_views[0].tokens_scored - before == 11 * alone


def test_an_error_in_one_thread_leaves_the_others_as_they_were():
    base, one, two = views()
    expected = scores(one), gradient(two)

    def fail() -> None:
        with pytest.raises(IndexError):
            base.forward(torch.tensor([[V + 3]]))

    found = together(fail, lambda: scores(one), lambda: gradient(two))
    assert_each(found[1], expected[0])
    assert_each(found[2], expected[1])
    assert all(p.requires_grad for p in base.network.base_parameters)
    assert set(base.network.base_parameters) < set(base.model.parameters())


def test_a_copy_runs_while_the_original_is_held():
    lm = views()[1]
    other = copy.deepcopy(lm)
    with lm.network.lock, ThreadPoolExecutor(1) as pool:
        copied = pool.submit(scores, other).result(timeout=60)
    assert_each([copied], scores(lm))
