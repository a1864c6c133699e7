"""Dead ends: text constraints have none of their own making; a particle that meets one elsewhere has weight zero."""

from __future__ import annotations

import re
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from constraint_cases import AB, BRACKETS, spelled_lm, tensor
from five_sigma import within
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_grammars import PATTERNS
from tiny import flat_lm
from torch import Tensor

from lmppl import check
from lmppl.constraints import Check, every, grammar, regex, without
from lmppl.constraints.masks import keeps
from lmppl.distributions import Completion, DeadEnd
from lmppl.inference import SMC, GFlowNet, Importance, MetropolisHastings, PooledVarGrad, VarGrad, ZeroEvidence
from lmppl.inference.training.gflownet import Tempered
from lmppl.text import PAD, length

# -- text constraints ------------------------------------------------------------------------------------------------

STOPS = ["eos", ".", ["eos", "."], [".", "b"], "ab", ["abb", "<eos"]]
OVERLAPPING = spelled_lm("a", "b", "c", "bc", "abc", "cb", "!")  # "bc" can be spelled in three ways


def bodies(lm, stops: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    content = [v for v in range(1, len(lm.tokenizer)) if v not in stops]
    found: list[tuple[int, ...]] = [()]
    for z in found:
        if len(z) < most:
            found.extend((*z, v) for v in content)
    return found


@cache
def written(lm, stops: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[str]]:
    """Every text of at most three tokens and a stop, and its string."""
    texts = [(*z, s) for z in bodies(lm, stops, 3) for s in stops]
    return texts, [lm.vocabulary.decode(list(z)) for z in texts]


def assert_no_dead_end(allowed, lm, stops: tuple[int, ...], most: int, ahead: int) -> None:
    """From every permitted prefix of at most ``most`` tokens a stop is permitted within ``ahead`` more."""
    level = [()]
    for n in range(most):
        masks = allowed(torch.tensor(level, dtype=torch.long).view(len(level), n))
        assert bool(masks.any(-1).all())
        level = [
            (*z, v) for z, m in zip(level, masks, strict=True) for v in m.nonzero()[:, 0].tolist() if v not in stops
        ]
        if not level:
            return
    for z in level:
        queue = [z]
        for prefix in queue:
            options = allowed(torch.tensor(prefix)).nonzero()[:, 0].tolist()
            if set(options) & set(stops):
                break
            if len(prefix) < most + ahead:
                queue.extend((*prefix, v) for v in options)
        else:
            raise AssertionError(f"{z} leads nowhere")


@settings(max_examples=60)
@given(
    st.sampled_from([AB, OVERLAPPING]),
    PATTERNS,
    st.sampled_from(["", r"\.", "b", "ab", "bc", "!", "x?", "(x|bc)"]),
    st.integers(0, len(STOPS) - 1),
)
def test_what_is_permitted_is_what_can_be_written_and_ended(lm, pattern, ending, which):
    """The texts that can be drawn are those that match, and every prefix on the way to others is forbidden."""
    pattern += ending
    stop = STOPS[which] if lm is AB else ["eos", "bc", ["bc", "eos"], "c", ["c", "bc"], "!"][which]
    stops = tuple(lm.stop_ids(stop).tolist())
    texts, strings = written(lm, stops)
    matches = re.compile(pattern, re.DOTALL).fullmatch
    expected = [matches(string) is not None for string in strings]
    try:
        allowed = regex(lm, pattern, stop=stop)
    except ValueError as error:
        assert repr(pattern) in str(error) and not any(expected)
        return
    assert keeps(allowed, tensor(texts), lm.vocab_size).tolist() == expected
    assert_no_dead_end(allowed, lm, stops, most=2, ahead=8)


@settings(max_examples=30)
@given(PATTERNS)
def test_without_a_stop_what_is_permitted_goes_on_to_a_complete_text(pattern):
    allowed = regex(AB, f"b{pattern}x|a{pattern}", stop=None)
    complete = re.compile(f"a{pattern}", re.DOTALL)
    for z in bodies(AB, (), 2):
        said = AB.vocabulary.decode(list(z))
        if said and complete.fullmatch(said):
            assert bool(keeps(allowed, torch.tensor(z), 8))
        if said.startswith("b"):
            assert not bool(keeps(allowed, torch.tensor(z), 8))


def test_a_token_that_says_the_stop_with_something_before_it():
    lm = spelled_lm(" 8", "0", "%", "%.", ".", "0%.", "..")
    allowed = regex(lm, r" \d+%\.", stop=".")
    z = torch.tensor([1, 2])
    assert allowed(z).nonzero()[:, 0].tolist() == [2, 3]  # neither "%." nor "0%."
    fn = Completion(lm, " 8", max_tokens=9, stop=".", allowed=allowed)
    drawn = fn.sample((200,))
    whole = drawn[length(drawn) < 10]
    assert len(whole) and all(re.fullmatch(r" \d+%\.", said) for said in lm.decode(whole))


def test_a_stop_inside_the_text_is_written_as_part_of_other_tokens_only():
    """ "3" "." would stop there; "3" ".5" does not."""
    with_part, without_part = spelled_lm("3", "5", "%", ".", ".5"), spelled_lm("3", "5", "%", ".")
    allowed = regex(with_part, r"\d+(\.\d+)?%\.", stop=".")
    assert allowed(torch.tensor([1])).nonzero()[:, 0].tolist() == [1, 2, 3, 5]
    assert regex(without_part, r"\d+(\.\d+)?%\.", stop=".")(torch.tensor([1])).nonzero()[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"pattern.*d\+"):
        regex(without_part, r"\d+\.\d+%\.", stop=".")


def test_a_grammar_looks_several_tokens_ahead():
    """After "(" only "(" and ")" may come; after ")x" only an "!", which nothing spells."""
    allowed = grammar(BRACKETS, 'start: "(" start ")" | "x" | ")" "x" "x" "!"')
    assert allowed(torch.tensor([], dtype=torch.long)).nonzero()[:, 0].tolist() == [1, 4, 5]
    assert_no_dead_end(allowed, BRACKETS, (0,), most=3, ahead=6)


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (lambda: regex(AB, ""), "empty"),
        (lambda: regex(AB, "xyz"), "xyz"),
        (lambda: regex(AB, "[a-z]+", stop="."), "[a-z]+"),
        (lambda: grammar(AB, 'start: "a" "xx"'), 'start: "a" "xx"'),
        (lambda: without(AB, ["."], stop="."), "strings"),
    ],
)
def test_a_constraint_that_permits_no_text_is_refused_when_made(make, written):
    with pytest.raises(ValueError, match=re.escape(written)):
        make()


# -- particles that die ----------------------------------------------------------------------------------------------

LM = flat_lm(vocab=6, dtype=torch.float64)  # <eos> . a b c d
A, B, C, D = range(2, 6)
RUNS = 400


def narrow(prefix: Tensor) -> Tensor:
    """Nothing after "a", nor after "b" "c"; no "d" at all."""
    mask = torch.ones(*prefix.shape[:-1], 6, dtype=torch.bool)
    mask[..., D] = False
    dead = (prefix == A).any(-1)
    if prefix.shape[-1] > 1:
        dead = dead | ((prefix[..., :-1] == B) & (prefix[..., 1:] == C)).any(-1)
    return mask & ~dead[..., None]


CONSTRAINTS = {
    "function": lambda: narrow,
    "every": lambda: every(torch.ones(6, dtype=torch.bool), narrow),
    "check": lambda: Check(LM, lambda p, v: narrow(p).gather(-1, v[:, None])[:, 0]),
    "check within": lambda: every(Check(LM, lambda p, v: (v != A) | (p.shape[1] > 0)), narrow),
}


def constrained(lm, allowed, stop="eos", **kwargs):
    return Completion(lm, torch.tensor([A, B]), max_tokens=3, stop=stop, allowed=allowed, **kwargs)


def factor(z: Tensor) -> Tensor:
    return 0.7 * (z == C).sum(-1) - 0.4 * length(z)


def programs_of(allowed, guided: bool, stop="eos", scale: float = 1.0):
    def model():
        with pyro.plate("runs", RUNS):
            with pyro.poutine.scale(scale=scale):
                z = pyro.sample("z", constrained(LM, None if guided else allowed, stop))
            pyro.factor("f", factor(z))

    def guide():
        with pyro.plate("runs", RUNS):
            pyro.sample("z", constrained(LM, allowed, stop, temperature=1.5))

    return model, guide if guided else None


def evidence(allowed, guided: bool, stop="eos", scale: float = 1.0) -> Tensor:
    """Over the texts that the guide can draw: the mass that it loses in dead ends counts as zero."""
    p, q = constrained(LM, None if guided else allowed, stop), constrained(LM, allowed, stop)
    z = p.enumerate_support()
    with torch.no_grad():
        return (
            (scale * p.log_prob(z) + factor(z)).masked_fill(q.log_prob(z) == -torch.inf, -torch.inf).logsumexp(0).exp()
        )


@pytest.mark.parametrize(
    ("name", "stop"), [*((name, "eos") for name in CONSTRAINTS), ("function", ["eos", "."]), ("check", None)]
)
@pytest.mark.parametrize("guided", [False, True])
def test_evidence_is_unbiased_where_particles_die(name, guided, stop):
    allowed = CONSTRAINTS[name]()
    model, guide = programs_of(allowed, guided, stop)
    exact = evidence(allowed, guided, stop)
    for algorithm in (Importance(model, guide, 8), SMC(model, guide, 8, 1.0), SMC(model, guide, 8, twist="stop")):
        posterior = algorithm.run()
        within(posterior.log_evidence.exp(), exact)
        z, log_w = posterior.samples["z"], posterior.log_weights
        dead = length(z) < 3 if stop is None else ~torch.isin(z, constrained(LM, None, stop).stop).any(-1)
        assert bool((log_w[dead] == -torch.inf).all()) and not bool(log_w.isnan().any())
        assert isinstance(algorithm, SMC) or bool(dead.any())


def test_evidence_of_a_scaled_site_where_particles_die():
    model, guide = programs_of(narrow, False, scale=0.5)
    for algorithm in (Importance(model, guide, 8), SMC(model, guide, 8, 1.0)):
        within(algorithm.run().log_evidence.exp(), evidence(narrow, False, scale=0.5))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_draw_that_dies_is_a_text_of_probability_zero(name):
    fn = constrained(LM, CONSTRAINTS[name]())
    z, log_prob = fn.sample_and_log_prob((300,))
    dead = ~(z == 0).any(-1)
    assert 0 < int(dead.sum()) < 300 and torch.equal(dead, log_prob == -torch.inf)
    torch.testing.assert_close(log_prob, fn.log_prob(z), atol=1e-9, rtol=0)
    assert bool(((z[dead] == A).any(-1) | (z[dead] == C).any(-1)).all())
    again, log_again = fn.regrow(z, 0)
    assert torch.equal(~(again == 0).any(-1), log_again == -torch.inf)


def test_sample_says_which_text_led_there():
    fn = constrained(LM, narrow)
    z, log_prob = fn.sample_and_log_prob((50,))
    pyro.set_rng_seed(1)
    with pytest.raises(DeadEnd, match="allowed") as raised:
        fn.sample((50,))
    dead = {LM.decode(t) for t in constrained(LM, narrow).sample_and_log_prob((200,))[0] if not (t == 0).any()}
    assert any(f"after {said!r}" in str(raised.value) for said in dead)
    assert PAD in z and bool((log_prob == -torch.inf).any())


def test_where_all_particles_die_the_evidence_is_zero():
    def nothing(prefix: Tensor) -> Tensor:
        return torch.full((*prefix.shape[:-1], 6), prefix.shape[-1] < 1) & (torch.arange(6) > 1)

    def model():
        z = pyro.sample("z", constrained(LM, None))
        pyro.sample("y", dist.Normal(length(z).double(), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", constrained(LM, nothing))

    for algorithm in (Importance(model, guide, 8), SMC(model, guide, 8, 1.0), SMC(model, guide, 8, 1.0, twist="flow")):
        posterior = algorithm.run()
        assert posterior.log_evidence == -torch.inf
        with pytest.raises(ZeroEvidence):
            posterior.table("z")
        with pytest.raises(ZeroEvidence):
            posterior.resample(3)


@pytest.mark.slow
def test_texts_after_one_that_died():
    """Two texts, the second about the first: what follows a dead text changes nothing."""

    def model():
        z = pyro.sample("z", constrained(LM, narrow))
        w = pyro.sample("w", Completion(LM, LM.join(torch.tensor([A]), z), max_tokens=1))
        pyro.factor("f", factor(w))

    z = constrained(LM, narrow).enumerate_support()
    w = Completion(LM, LM.join(torch.tensor([A]), z), max_tokens=1)
    values = w.enumerate_support()
    inner = (w.log_prob(values) + factor(values)).logsumexp(0)
    exact = (constrained(LM, narrow).log_prob(z) + inner).logsumexp(0).exp().detach()
    for algorithm in (Importance(model, None, 8), SMC(model, None, 8, 1.0)):
        within(torch.stack([algorithm.run().log_evidence for _ in range(200)]).exp(), exact)


def test_chains_leave_a_dead_end_and_never_enter_one():
    model, guide = programs_of(narrow, True)
    posterior = MetropolisHastings(model, guide, num_samples=20, num_chains=4, warmup=20).run()
    assert bool((posterior.samples["z"] == 0).any(-1).all())


@pytest.mark.parametrize("exploration", [None, Tempered(fraction=0.5)])
@pytest.mark.parametrize("objective", [VarGrad, PooledVarGrad])
def test_a_gflownet_learns_from_the_draws_that_live(objective, exploration):
    lm = LM.with_adapter(LoraConfig(r=2, target_modules="all-linear"))

    def model():
        z = pyro.sample("z", constrained(LM, None))
        pyro.factor("f", factor(z))

    def guide():
        pyro.sample("z", constrained(lm, narrow))

    optimizer = torch.optim.Adam(lm.trainable_parameters(), 1e-2)
    trainer = GFlowNet(
        model, guide, objective(num_particles=16), optimizer=optimizer, replay=None, exploration=exploration
    )
    for _ in range(3):
        figures = trainer.step()
        assert torch.tensor(figures["loss"]).isfinite()
    assert all(p.isfinite().all() for p in lm.trainable_parameters())


def test_check_says_that_draws_die():
    model, guide = programs_of(narrow, True)
    problems = check(model, guide, show=False, steps=0).problems
    assert any("site 'z'" in p and "allows no token" in p for p in problems), problems
