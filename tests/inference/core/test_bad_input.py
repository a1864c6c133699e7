"""Bad input: a typed exception that names the argument, and no silent number."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from tiny import flat_lm

from lmppl import LanguageModel, constraints, text
from lmppl.adapters import CheckpointError
from lmppl.distributions import Completion, NextToken
from lmppl.inference import SMC, Importance
from lmppl.inference.core.programs import SiteMismatch
from lmppl.inference.posterior.posterior import ZeroEvidence
from lmppl.inference.training.gflownet import PooledVarGrad, SubTB, Tempered, VarGrad
from lmppl.text import PAD

V = 6
PROMPT = torch.tensor([[2, 3], [4, PAD]])
OBJECTIVES = {"SubTB": SubTB, "VarGrad": VarGrad, "PooledVarGrad": PooledVarGrad}


@pytest.fixture
def lm() -> LanguageModel:
    return flat_lm(vocab=V)


COMPLETIONS = {
    "prompt: ids": ("prompt", {"prompt": torch.tensor([2, V])}),
    "prompt: below PAD": ("prompt", {"prompt": torch.tensor([2, -2])}),
    "prompt: PAD inside": ("prompt", {"prompt": torch.tensor([2, PAD, 3])}),
    "prompt: floats": ("prompt", {"prompt": torch.tensor([2.0, 3.0])}),
    "prompt: too long": ("prompt", {"max_tokens": 63}),
    "max_tokens: negative": ("max_tokens", {"max_tokens": -1}),
    "max_tokens: a float": ("max_tokens", {"max_tokens": 2.5}),
    "max_tokens: shape": ("max_tokens", {"max_tokens": torch.tensor([1, 2, 3])}),
    "min_tokens: negative": ("min_tokens", {"min_tokens": -1}),
    "min_tokens: above max_tokens": ("min_tokens", {"min_tokens": 4}),
    "min_tokens: shape": ("min_tokens", {"min_tokens": torch.tensor([1, 0, 1])}),
    "both limits: shape": ("m.._tokens", {"min_tokens": torch.tensor([1, 0, 1]), "max_tokens": torch.tensor([3, 3])}),
    "stop: spelled by no tokens": ("stop", {"stop": "xy"}),
    "stop: unknown": ("stop", {"stop": V}),
    "stop: none of several": ("stop", {"stop": []}),
    "allowed: mask": ("allowed", {"allowed": torch.ones(V + 1, dtype=torch.bool)}),
    "allowed: ids": ("allowed", {"allowed": [V]}),
    "allowed: nothing": ("allowed", {"allowed": torch.zeros(V, dtype=torch.bool)}),
    "temperature: zero": ("temperature", {"temperature": 0.0}),
    "temperature: NaN": ("temperature", {"temperature": float("nan")}),
    "temperature: shape": ("temperature", {"temperature": torch.ones(3)}),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completion(lm, case):
    name, change = COMPLETIONS[case]
    with pytest.raises(ValueError, match=name):
        Completion(**{"lm": lm, "prompt": PROMPT, "max_tokens": 3, **change})


@pytest.mark.parametrize("prompt", [None, 3, [2, 3]])
def test_a_prompt_that_is_no_text(lm, prompt):
    with pytest.raises(ValueError, match="^prompt"):
        Completion(lm, prompt, max_tokens=1)
    with pytest.raises(ValueError, match="^context"):
        NextToken(lm, prompt)


def test_strings_are_prompts(lm):
    assert Completion(lm, ["ab", "a"], max_tokens=1).batch_shape == NextToken(lm, ["ab", "a"]).batch_shape == (2,)


@pytest.mark.parametrize("shape", [(), (V + 1,)])
def test_a_constraint_that_returns_nonsense(lm, shape):
    for answer in (torch.ones(shape, dtype=torch.bool), torch.ones(V), [True] * V):
        d = Completion(lm, PROMPT, max_tokens=2, allowed=lambda prefix, answer=answer: answer)
        with pytest.raises(ValueError, match="allowed"):
            d.sample()


def test_constraints(lm):
    with pytest.raises(ValueError, match="stop"):
        constraints.only(lm, ["ab"])
    with pytest.raises(ValueError, match="stop"):
        constraints.ban(lm, [V])


@pytest.mark.parametrize("value", [[2, V, 0], [2, -2, 0], [2, PAD, 0]])
@pytest.mark.parametrize("method", ["log_prob", "token_log_probs", "prefix_log_probs"])
def test_malformed_values(lm, method, value):
    d = Completion(lm, PROMPT, max_tokens=3)
    with pytest.raises(ValueError, match="value"):
        getattr(d, method)(torch.tensor(value))


def test_values_of_the_wrong_kind_or_shape(lm):
    d = Completion(lm, PROMPT, max_tokens=3)
    for bad in (torch.tensor([2.0, 0.0]), torch.tensor(0), torch.zeros(3, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match="value"):
            d.log_prob(bad)
    n = NextToken(lm, PROMPT)
    for bad in (torch.tensor(V), torch.tensor(PAD), torch.tensor(1.0), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="value"):
            n.log_prob(bad)


def test_a_value_outside_the_support_is_impossible_not_wrong(lm):
    d = Completion(lm, PROMPT, max_tokens=2, min_tokens=1, allowed=constraints.ban(lm, ["a"]))
    outside = {"too short": [0], "too long": [3, 3, 3, 0], "banned": [2, 0], "no stop": [3, 3], "goes on": [3, 0, 3]}
    for value in outside.values():
        assert (d.log_prob(torch.tensor(value)) == -torch.inf).all()


def test_enumeration_of_a_large_space(lm):
    with pytest.raises(ValueError, match="enumerate_support"):
        Completion(lm, PROMPT, max_tokens=20).enumerate_support()


def test_texts(lm):
    with pytest.raises(ValueError, match="broadcast"):
        lm.join(PROMPT, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="width"):
        text.pad(PROMPT, 1)
    with pytest.raises(ValueError, match="text"):
        lm.decode(torch.tensor([V]))


# Model and guide ------------------------------------------------------------------------------------------------------


def programs_of(lm):
    def model(scale=0.0):
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))
            pyro.sample("y", Completion(lm, lm.join(PROMPT, z), max_tokens=2), obs=torch.tensor([2, 0]))
            pyro.factor("f", torch.full(z.shape[:-1], scale))

    def guide(scale=0.0):
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))

    return model, guide


def runs(model, guide):
    yield lambda: Importance(model, guide, num_particles=4).run()
    for kind in OBJECTIVES.values():
        yield lambda kind=kind: kind(num_particles=4).loss(model, guide)


def test_guides_that_do_not_match(lm):
    model, guide = programs_of(lm)

    def lacks(*_):
        pass

    def renamed(*_):
        with pyro.plate("data", 2):
            pyro.sample("w", Completion(lm, PROMPT, max_tokens=2))

    def samples_an_observation(*_):
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))
            pyro.sample("y", Completion(lm, PROMPT, max_tokens=2))

    for bad, site in ((lacks, "z"), (renamed, "w|z"), (samples_an_observation, "y")):
        for run in runs(model, bad):
            with pytest.raises(SiteMismatch, match=f"guide.*({site})"):
                run()


def test_zero_evidence(lm):
    """-inf where nothing is possible, not NaN; an exception only where the posterior is used."""
    model, guide = programs_of(lm)
    for q in (None, guide):
        posterior = Importance(model, q, num_particles=4).run(-torch.inf)
        assert (posterior.log_evidence == -torch.inf).all() and (posterior.ess == 0).all()
        for use in (lambda p=posterior: p.table("z", 0), posterior.resample, lambda p=posterior: p.predictive(model)):
            with pytest.raises(ZeroEvidence):
                use()


EOS = 0
IMPOSSIBLE = {  # a possible observation, an impossible one, the site's options
    "no stop": ([2, EOS], [2, PAD], {}, "does not end with its stop token"),
    "the stop inside": ([2, 3, EOS, PAD], [2, EOS, 3, EOS], {}, "goes on after its first stop"),
    "too long": ([2, 3, EOS, PAD], [2, 3, 2, EOS], {}, "up to 3 tokens before its stop, more than max_tokens=2"),
    "too short": ([2, 3, EOS], [2, EOS, PAD], {"min_tokens": 2}, "only 1 token.* before its stop, fewer than min_.*=2"),
    "not so long": ([2, 3], [2, PAD], {"stop": None}, "exactly max_tokens tokens"),
    "another stop": ([2, 3], [2, EOS], {"stop": 3}, r"does not end with its stop token \('b'\)"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_an_observation_that_no_latent_explains_is_named_with_its_element(lm, case, algorithm):
    possible, impossible, options, said = IMPOSSIBLE[case]
    y = torch.tensor([possible, impossible])

    def model():
        with pyro.plate("stories", 2):
            z = pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))
            pyro.sample("y", Completion(lm, lm.join(PROMPT, z), max_tokens=2, **options), obs=y)

    posterior = algorithm(model, num_particles=4).run()
    assert posterior.log_evidence[1] == -torch.inf and posterior.log_evidence[0].isfinite()
    assert posterior.table("z", 0)
    for use in (lambda: posterior.table("z", 1), posterior.resample, posterior.to_arviz):
        with pytest.raises(ZeroEvidence, match=f"at stories 1: site 'y': .*{said}"):
            use()


def test_a_text_is_no_reason_at_another_element(lm):
    def model():
        with pyro.plate("stories", 2):
            z = pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))
            y = torch.tensor([[2, PAD], [2, EOS]])
            pyro.sample("y", Completion(lm, lm.join(PROMPT, z), max_tokens=1), obs=y)
            pyro.factor("never", torch.tensor([0.0, -torch.inf]))

    posterior = Importance(model, num_particles=4).run()
    for element, why in (0, "site 'y': the observed text does not end"), (1, "the observation or a factor"):
        with pytest.raises(ZeroEvidence, match=f"at stories {element}: {why}"):
            posterior.table("z", element)


def test_a_masked_observation_may_be_of_any_form(lm):
    """Whether a text counts is said by the masks; a text that does not is no reason."""
    nothing = torch.tensor([[2, PAD], [EOS, PAD]])

    def model():
        with pyro.plate("stories", 2):
            z = pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))
            with pyro.poutine.mask(mask=torch.tensor([False, True])):
                pyro.sample("y", Completion(lm, lm.join(PROMPT, z), max_tokens=1), obs=nothing)
            pyro.factor("never", torch.tensor([-torch.inf, 0.0]))

    posterior = Importance(model, num_particles=4).run()
    with pytest.raises(ZeroEvidence, match="at stories 0: the observation or a factor"):
        posterior.table("z", 0)


def test_nan_anywhere_is_an_error_of_its_site(lm):
    model, guide = programs_of(lm)
    for run in (
        lambda: Importance(model, guide, num_particles=4).run(torch.nan),
        *(lambda k=k: k(num_particles=4).loss(model, guide, torch.nan) for k in OBJECTIVES.values()),
    ):
        with pytest.raises(ValueError, match="'f'.*NaN|value"):
            run()


def test_a_network_with_nan_weights(lm):
    model, guide = programs_of(lm)
    with torch.no_grad():
        lm.model.transformer.ln_f.weight.fill_(torch.nan)
    for run in runs(model, guide):
        with pytest.raises(ValueError, match="lm.*NaN"):
            run()


@pytest.mark.parametrize("objective", OBJECTIVES.values())
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_particles", {"num_particles": 0}),
        ("prefixes", {"prefixes": 1}),
        ("prefixes", {"prefixes": "some"}),
        ("prefixes", {"prefixes": 2.5}),
        ("reward_temperature", {"reward_temperature": 0.0}),
    ],
)
def test_objective_options(objective, name, options):
    with pytest.raises(ValueError, match=name):
        objective(**options)


def test_options_of_one_objective():
    with pytest.raises(ValueError, match="lam"):
        SubTB(lam=0.0)
    with pytest.raises(ValueError, match="weights"):
        PooledVarGrad(weights="length")
    with pytest.raises(ValueError, match="fraction"):
        Tempered(fraction=1.5)
    with pytest.raises(ValueError, match="temperature"):
        Tempered(temperature=-1.0)
    with pytest.raises(ValueError, match="num_particles"):
        Importance(lambda: None, num_particles=0)


def test_a_subsampled_plate_that_encloses_only_part_of_the_model(lm):
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", Completion(lm, PROMPT, max_tokens=2))

    with pytest.raises(ValueError, match="data"):
        Importance(model, num_particles=4).run()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_paths_that_hold_nothing(lm, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=path.name):
            LanguageModel.from_pretrained(path)
        with pytest.raises(CheckpointError, match=path.name):
            lm.with_adapter(path)


def test_an_adapter_is_no_language_model_and_the_reverse(lm, tmp_path):
    lm.with_adapter(LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    lm.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="adapter"):
        LanguageModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="base"):
        lm.with_adapter(tmp_path / "base")


def test_damaged_weights(lm, tmp_path):
    lm.save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="base"):
        LanguageModel.from_pretrained(tmp_path / "base")
