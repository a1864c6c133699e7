"""Tempered continuation: the target by plain loops, its evidence by sampling, a short training, the command line."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from reference import Law, Plain, tokens
from tiny import flat_lm

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, Importance
from lmppl.inference.judging.quality import density_quality
from lmppl.models import Continuation, Recipe, continuation, decoding, measures
from lmppl.models.experiment import split

MAX_TOKENS = 3
T = torch.tensor([0.5, 0.8], dtype=torch.float64)


@pytest.fixture(scope="module")
def tiny() -> tuple[LanguageModel, torch.Tensor]:
    lm = flat_lm(vocab=6)
    return lm, lm.encode(["ab", "c"])


@pytest.fixture(scope="module")
def embedded() -> LanguageModel:
    return LanguageModel.embedded("stories")


@pytest.fixture(scope="module")
def targets(tiny) -> list[dict[tuple[int, ...], float]]:
    """log p(z | x) / T of every text, for each prompt, by plain loops."""
    lm, x = tiny
    plain, end = Plain(lm), lm.token_id(".")
    laws = [Law(plain, tokens(prompt), MAX_TOKENS, stops=(end,)) for prompt in x]
    return [{z: p / float(t) for z, p in law.support().items()} for law, t in zip(laws, T, strict=True)]


def test_the_enumerated_target_is_that_of_plain_loops(tiny, targets):
    lm, x = tiny
    exact = Enumeration(Continuation(lm, max_tokens=MAX_TOKENS).model).run(x, T)
    for i, target in enumerate(targets):
        log_z = math.log(sum(math.exp(u) for u in target.values()))
        assert float(exact.log_evidence[i]) == pytest.approx(log_z, abs=1e-9)
        found = {tokens(z): float(w) for z, w in zip(exact.samples["z"][:, i], exact.probabilities[:, i], strict=True)}
        assert found.keys() == target.keys()
        assert all(found[z] == pytest.approx(math.exp(u - log_z), abs=1e-9) for z, u in target.items())


def test_the_bound_on_what_a_partial_enumeration_leaves_out_holds(tiny):
    """With s = 1 / T >= 1 the rest adds at most unexplored^s; with the smallest s of the plate it holds for all."""
    lm, x = tiny
    model = Continuation(lm, max_tokens=MAX_TOKENS).model
    whole, part = Enumeration(model).run(x, T), Enumeration(model, mass=0.8).run(x, T)
    low, high = part.log_evidence_bounds
    assert bool((part.unexplored > 0.01).all())
    assert bool((low <= whole.log_evidence).all()) and bool((whole.log_evidence <= high).all())


def test_importance_sampling_from_the_prior_estimates_the_tempered_evidence(tiny):
    r"""Z = E_p[p(z)^(1/T - 1)]: the mean of N weights, whose standard error is their spread over sqrt(N)."""
    lm, x = tiny
    model, n = Continuation(lm, max_tokens=MAX_TOKENS).model, 4000
    truth = Enumeration(model).run(x, T).log_evidence.exp()
    weights = Importance(model, num_particles=n).run(x, T).log_weights.exp() * n  # (N, 2)
    error = (weights.mean(0) - truth).abs()
    assert bool((error < 5 * weights.std(0) / n**0.5).all())


def test_a_sequence_temperature_is_no_token_temperature(tiny):
    """Token by token, a text's probability is divided by every normaliser on its way; the sequence has one."""
    lm, x = tiny
    exact = Enumeration(Continuation(lm, max_tokens=MAX_TOKENS).model).run(x, T)
    by_token = Completion(lm, x, max_tokens=MAX_TOKENS, stop=".", temperature=T).log_prob(exact.samples["z"])
    inside = exact.log_prior > -torch.inf
    assert torch.allclose((by_token.exp() * inside).sum(0), torch.ones(2).double(), atol=1e-9)  # a distribution as well
    tv = 0.5 * (by_token.exp() * inside - exact.probabilities).abs().sum(0)
    assert bool((tv > 0.02).all())


@pytest.mark.slow
def test_a_short_training_comes_close_to_the_target(embedded):
    """Less than half of the distance is left, on prompts that it was not trained on."""
    del embedded
    recipe = Recipe(observations=4, particles=16, learning_rate=2e-3)
    experiment = continuation.experiment(recipe=recipe, temperature=0.25)
    args = tuple(a[:2] for a in experiment.test)
    exact = Enumeration(experiment.model, mass=0.99).run(*args)

    def tv() -> float:
        return float(density_quality(exact, experiment.guide, args, {}).total_variation.mean())

    before = tv()
    experiment.gflownet().fit(experiment.batches, 60, seed=0, progress=False)
    after = tv()
    print(before, after)
    assert before > 0.6 and after < before / 2


def test_a_guide_of_several_temperatures_reads_which_one(embedded):
    experiment = continuation.experiment(temperature=(0.8, 0.95))
    x, temperatures = experiment.test
    assert temperatures.tolist() == pytest.approx([0.8, 0.95] * (len(x) // 2))
    assert "0.8, 0.95" in experiment.target and "T = 0.95" in experiment.describe(1)
    seen = {tuple(experiment.batches(step)[1].tolist()) for step in range(2)}
    assert len(seen) == 2  # the temperatures take turns
    task = Continuation(embedded, embedded, template="{T}\n{x}", write=continuation.symbols)
    same = x[:1].expand(2, -1)
    prompt = task.guide_prompt(same, torch.tensor([0.8, 0.95]))
    assert not bool(text.equal(prompt[0], prompt[1])) and bool(text.equal(prompt[:, -x.shape[1] :], same).all())
    assert embedded.decode(prompt[0]).startswith("|?|\nStory: ")
    free = Continuation(embedded, embedded)  # without T in the template: the same prompt for both
    prompt = free.guide_prompt(same, torch.tensor([0.8, 0.95]))
    assert bool(text.equal(prompt[0], prompt[1]))


def test_the_splits_share_no_beginning():
    train, held_out, test = continuation.embedded_prompts()
    assert len(train) + len(held_out) + len(test) == 64 == len({*train, *held_out, *test})
    assert [len(part) for part in split(list(range(40)))] == [30, 5, 5]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), (), (0.8, 0.0), (0.8, 0.801)])
def test_a_wrong_temperature_is_refused_by_name(temperature):
    with pytest.raises(ValueError, match="temperature"):
        continuation.experiment(temperature=temperature)


def test_too_long_a_prompt_is_refused_by_name(tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n" + "abcdefgh" * 8 + "\n")
    with pytest.raises(ValueError, match="data: the prompt 'abcdefgh"):
        continuation.experiment(flat_lm(vocab=12), tmp_path / "prompts.txt", recipe=Recipe(adapter={"r": 1}))


# -- decoding ---------------------------------------------------------------------------------------------------------


def methods(n: int) -> dict:
    return {
        "greedy": {},
        "beam": {"num_beams": n, "length_penalty": 0.0},
        "nucleus": {"do_sample": True, "top_p": 0.9},
        "token temperature": {"do_sample": True, "temperature": 0.7},
    }


@pytest.mark.parametrize("name", methods(4))
def test_what_a_method_decodes_is_scored_by_the_base_model(tiny, targets, name):
    """Each text is one of the model's own, and its score the plain loops' log p(z | x), whatever adapter is active."""
    lm, x = tiny
    guide = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    guide(torch.tensor([[2]]))  # its adapter is now the active one
    z = decoding.generate(lm, x, 4, max_tokens=MAX_TOKENS, **methods(4)[name])
    log_p = decoding.log_likelihood(lm, x, z, max_tokens=MAX_TOKENS)
    for i in range(len(x)):
        for row, found in zip(z[:, i], log_p[:, i], strict=True):
            assert float(found) == pytest.approx(targets[i][tokens(row)] * float(T[i]), abs=1e-9)


def test_greedy_takes_the_most_probable_token_every_time(tiny):
    lm, x = tiny
    plain, end = Plain(lm), lm.token_id(".")
    found = decoding.generate(lm, x, 2, max_tokens=MAX_TOKENS)
    assert bool(text.equal(found[0], found[1]).all())
    for i, prompt in enumerate(x):
        law, z = Law(plain, tokens(prompt), MAX_TOKENS, stops=(end,)), ()
        while end not in z:
            z = (*z, int(law.next(z).argmax()))
        assert tokens(found[0, i]) == z


def test_as_many_beams_as_texts_find_the_most_probable_ones(tiny, targets):
    """With room for every prefix, beam search is exact: the n best of all texts, in order."""
    lm, x = tiny
    found = decoding.beams(lm, x, 160, max_tokens=MAX_TOKENS)
    for i, target in enumerate(targets):
        best = sorted(target, key=lambda z: -target[z])[:20]
        assert [tokens(z) for z in found[:20, i]] == best


def test_one_group_is_the_beam_search_of_transformers(embedded):
    x = continuation.embedded_prompts()[2][:2]
    x = embedded.encode(x)
    theirs = decoding.generate(embedded, x, 4, max_tokens=7, num_beams=4, length_penalty=0.0)
    ours = decoding.beams(embedded, x, 4, max_tokens=7)
    assert bool(text.equal(ours, theirs).all())


def test_beams_do_not_depend_on_how_many_prompts_are_read_at_once(embedded):
    x = embedded.encode(["", *continuation.embedded_prompts()[2][:3]])
    whole = decoding.beams(embedded, x, 4, max_tokens=5, groups=2)
    before, embedded.token_budget = embedded.token_budget, 30
    try:
        parts = decoding.beams(embedded, x, 4, max_tokens=5, groups=2)
        alone = [decoding.beams(embedded, row[row >= 0][None], 4, max_tokens=5, groups=2) for row in x]
    finally:
        embedded.token_budget = before
    assert bool(text.equal(whole, parts).all()) and bool(text.equal(whole, torch.cat(alone, 1)).all())


def test_diverse_groups_differ_and_cost_likelihood(embedded):
    x = embedded.encode(continuation.embedded_prompts()[2][:2])
    plain = decoding.beams(embedded, x, 4, max_tokens=7)
    free = decoding.beams(embedded, x, 4, max_tokens=7, groups=4, penalty=0.0)
    diverse = decoding.beams(embedded, x, 4, max_tokens=7, groups=4, penalty=2.0)
    assert measures.distinct(free).tolist() == [0.25, 0.25]  # four greedy searches
    assert bool(text.equal(free[0], diverse[0]).all())  # the first group is charged nothing
    assert bool((measures.edit_distance(diverse) > measures.edit_distance(plain)).all())
    with pytest.raises(ValueError, match="groups: 3"):
        decoding.beams(embedded, x, 4, max_tokens=7, groups=3)
    with pytest.raises(ValueError, match="prompt: .* this model's context holds"):
        decoding.beams(embedded, x, 4, max_tokens=embedded.max_length)


def test_a_text_ends_with_its_first_stop_or_the_one_at_the_limit():
    z = torch.tensor([[3, 1, 4, 1], [3, 3, 3, 3], [1, -1, -1, -1]])
    assert decoding.ended(z, 1, 4).tolist() == [[3, 1, -1, -1, -1], [3, 3, 3, 3, 1], [1, -1, -1, -1, -1]]
    several = decoding.ended(torch.tensor([[3, 2, 1, 3], [3, 1, 2, 3], [3, 3, 3, 3]]), torch.tensor([1, 2]), 4)
    assert several.tolist() == [[3, 2, -1, -1, -1], [3, 1, -1, -1, -1], [3, 3, 3, 3, 1]]
