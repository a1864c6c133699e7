"""AutoGuide: the guide one would have written by hand."""

from __future__ import annotations

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from tiny import flat_lm

from lmppl.distributions import Completion
from lmppl.inference import SMC, AutoGuide, Enumeration, GFlowNet, Importance, PooledVarGrad, Replay
from lmppl.inference.core import programs
from lmppl.inference.judging.quality import density_quality
from lmppl.models.infilling import Infilling

CONFIG = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
TEMPLATE = "e{y}b{x}m"


class Setup:
    """Infilling on a tiny language model, with a guide that is not its base."""

    def __init__(self, vocab: int = 6, seed: int = 3, noise: float = 0.1):
        self.lm = flat_lm(seed=seed, vocab=vocab, dtype=torch.float64)
        self.q = self.lm.with_adapter(CONFIG)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for p in self.q.trainable_parameters():
                p.normal_(std=noise)
        self.task = Infilling(self.lm, self.q, max_tokens=2, stop=".", template=TEMPLATE)
        self.args = self.lm.encode(["abc", "b"]), self.lm.encode(["cab", "ca"])

    def trace(self, guide, particles: int = 7):
        pyro.set_rng_seed(0)
        return programs.trace(guide, self.args, {}, nesting=1, particles=particles)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def assert_same(a, b, sites=("z",)) -> None:
    for site in sites:
        x, y = a.nodes[site], b.nodes[site]
        assert torch.equal(x["value"], y["value"]) and x["fn"].batch_shape == y["fn"].batch_shape
        assert torch.equal(x["fn"].prompt.expand(*y["fn"].prompt.shape), y["fn"].prompt)
        with torch.no_grad():
            assert torch.equal(x["fn"].log_prob(x["value"]), y["fn"].log_prob(y["value"]))


def test_it_equals_the_guide_written_by_hand(setup):
    """Same samples under the same seed, same log q, same weights; nothing of the model but its plates is seen."""
    auto = AutoGuide(setup.task.model, setup.q, TEMPLATE)
    assert_same(setup.trace(auto), setup.trace(setup.task.guide))
    assert [n for n, s in setup.trace(auto).nodes.items() if s["type"] == "sample"][-2:] == ["stories", "z"]
    found = []
    for guide in (auto, setup.task.guide):
        pyro.set_rng_seed(0)
        found.append(Importance(setup.task.model, guide, num_particles=20).run(*setup.args))
    assert torch.equal(found[0].log_weights, found[1].log_weights)


def test_the_default_prompt_shows_what_is_observed_and_then_the_sites_own(setup):
    def by_hand(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(setup.q, setup.q.join(y, ".", x), max_tokens=2, stop="."))

    assert_same(setup.trace(AutoGuide(setup.task.model, setup.q, separator=".")), setup.trace(by_hand))


def test_building_and_sketching_cost_no_token_and_the_adapter_is_there_at_once(setup):
    before = setup.lm.tokens_scored
    auto = AutoGuide(setup.task.model, CONFIG, TEMPLATE, args=setup.args)
    assert len(auto.trainable_parameters()) == len(setup.q.trainable_parameters())
    assert auto.lm("z").network is setup.lm.network
    of_lm = AutoGuide(setup.task.model, CONFIG, TEMPLATE, lm=setup.lm)
    assert len(of_lm.trainable_parameters()) == len(auto.trainable_parameters())
    late = AutoGuide(setup.task.model, CONFIG, TEMPLATE)
    with pytest.raises(ValueError, match="args"):
        late.trainable_parameters()
    assert setup.lm.tokens_scored == before
    late(*setup.args)
    assert late.trainable_parameters()
    shared = [set(map(id, a.trainable_parameters())) for a in (auto, of_lm, late)]
    assert not shared[0] & shared[1] and not shared[1] & shared[2]


def test_saved_and_loaded_it_is_the_same(setup, tmp_path):
    auto = AutoGuide(setup.task.model, setup.q, TEMPLATE)
    auto.save_pretrained(tmp_path / "guide")
    loaded = AutoGuide(setup.task.model, tmp_path / "guide", TEMPLATE, args=setup.args)
    assert_same(setup.trace(auto), setup.trace(loaded))
    directly = AutoGuide(setup.task.model, setup.lm.with_adapter(tmp_path / "guide"), TEMPLATE)
    assert_same(setup.trace(auto), setup.trace(directly))


def test_limits_stops_constraints_and_masks_are_the_models():
    lm = flat_lm(vocab=6, dtype=torch.float64)
    q = lm.with_adapter(CONFIG)
    allowed = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    limits = {"max_tokens": torch.tensor([1, 3]), "min_tokens": 1, "allowed": allowed, "stop": ("eos", ".")}

    def model(x):
        with pyro.plate("data", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", Completion(lm, x, temperature=2.0, **limits))

    def by_hand(x):
        with pyro.plate("data", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", Completion(q, q.join("b", x), temperature=2.0, **limits))

    pyro.set_rng_seed(0)
    traces = []
    for guide in (AutoGuide(model, q, "b{x}"), by_hand):
        pyro.set_rng_seed(0)
        traces.append(programs.trace(guide, (lm.encode(["ab", "c"]),), {}, nesting=1, particles=9))
    assert_same(*traces)
    assert torch.equal(traces[0].nodes["z"]["mask"], traces[1].nodes["z"]["mask"])


class TwoTexts:
    """k ~ Categorical; z ~ LM(x); w ~ LM(x z); y ~ LM(x z w) observed."""

    def __init__(self):
        self.lm = flat_lm(vocab=4, seed=2, dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q = self.lm.with_adapter(CONFIG)
        self.args = (["ab", "b"], self.lm.encode(["ba", "a"], stop="eos"))
        self.probs = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def model(self, question, answer):
        x = self.lm.encode(question)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(self.probs))
            z = pyro.sample("z", Completion(self.lm, x, max_tokens=1))
            w = pyro.sample("w", Completion(self.lm, self.lm.join(x, z), max_tokens=1))
            y = pyro.sample("y", Completion(self.lm, self.lm.join(x, z, w), max_tokens=2), obs=answer)
            pyro.factor("f", torch.where(k == 1, 1.5, 0.0))
            return y

    templates = {"z": "{answer}.{question}", "w": "{answer}.{question}{z}"}

    def by_hand(self, question, answer):
        x, q = self.lm.encode(question), self.q
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(self.probs))
            z = pyro.sample("z", Completion(q, q.join(answer, ".", x), max_tokens=1))
            pyro.sample("w", Completion(q, q.join(answer, ".", x, z), max_tokens=1))


def test_two_texts_and_an_ordinary_site_from_the_prior():
    two = TwoTexts()
    traces = []
    for guide in (AutoGuide(two.model, two.q, two.templates), AutoGuide(two.model, two.q, separator="."), two.by_hand):
        pyro.set_rng_seed(0)
        traces.append(programs.trace(guide, two.args, {}, nesting=1, particles=6))
    for auto in traces[:2]:
        assert_same(auto, traces[2], ("z", "w"))
        assert torch.equal(auto.nodes["k"]["value"], traces[2].nodes["k"]["value"])


@pytest.mark.parametrize("template", [TwoTexts.templates, None])
def test_a_guide_for_the_ordinary_sites(template):
    two = TwoTexts()
    logits = torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)

    def ordinary(question, answer):
        with pyro.plate("data", 2):
            pyro.sample("k", dist.Categorical(logits=logits))

    auto = AutoGuide(two.model, two.q, template, ordinary=ordinary, separator=".")
    pyro.set_rng_seed(0)
    found = programs.trace(auto, two.args, {}, nesting=1, particles=50)
    assert torch.allclose(found.nodes["k"]["fn"].logits[0], logits.log_softmax(-1))
    assert found.nodes["w"]["fn"].prompt.shape[0] == 50
    exact = Enumeration(two.model).run(*two.args)
    n = 3000
    posterior = Importance(two.model, auto, num_particles=n).run(*two.args)
    error = (1 / posterior.ess - 1 / n).clamp(min=1e-5).sqrt()
    assert ((posterior.log_evidence - exact.log_evidence).abs() < 5 * error).all()


@pytest.mark.slow
def test_both_texts_are_trained_with_one_adapter():
    two = TwoTexts()

    def ordinary(question, answer):
        with pyro.plate("data", 2):
            pyro.sample("k", dist.Categorical(logits=logits))

    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    auto = AutoGuide(two.model, two.q, two.templates, args=two.args, ordinary=ordinary)
    assert auto.lm("z") is auto.lm("w") is two.q
    optimizer = torch.optim.AdamW([{"params": auto.trainable_parameters()}, {"params": [logits], "lr": 0.1}], lr=4e-2)
    gflownet = GFlowNet(two.model, auto, optimizer=optimizer, replay=Replay())
    before = gflownet.evaluate(*two.args)["held_out_ess"]
    gflownet.fit([two.args], 45, progress=False)
    assert before < 0.4 and gflownet.evaluate(*two.args)["held_out_ess"] > 0.7


def test_training_reaches_the_posterior():
    setup = Setup()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = AutoGuide(setup.task.model, CONFIG, TEMPLATE, args=setup.args)
    exact = Enumeration(setup.task.model).run(*setup.args)
    before = density_quality(exact, auto, setup.args, {}).total_variation
    optimizer = torch.optim.AdamW(auto.trainable_parameters(), lr=2e-2)
    GFlowNet(setup.task.model, auto, optimizer=optimizer).fit([setup.args], 80, progress=False)
    after = density_quality(exact, auto, setup.args, {}).total_variation
    assert float(before.mean()) > 0.25 and float(after.max()) < 0.1


def test_svi_finds_its_parameters_whatever_the_store_holds():
    setup = Setup(noise=0.02)
    pyro.clear_param_store()
    auto = AutoGuide(setup.task.model, setup.q, TEMPLATE)
    pyro.param("guide.0", torch.zeros(3))  # a namesake
    exact = Enumeration(setup.task.model).run(*setup.args)
    before = density_quality(exact, auto, setup.args, {}).total_variation
    svi = SVI(setup.task.model, auto, pyro.optim.Adam({"lr": 2e-2}), loss=PooledVarGrad(num_particles=16))
    losses = [svi.step(*setup.args) for _ in range(40)]
    after = density_quality(exact, auto, setup.args, {}).total_variation
    pyro.clear_param_store()
    assert float(after.mean()) < 0.5 * float(before.mean()) and sum(losses[-10:]) < sum(losses[:10])


def test_smc_is_unbiased_with_it(setup):
    auto = AutoGuide(setup.task.model, setup.q, TEMPLATE)
    exact = Enumeration(setup.task.model).run(*setup.args)
    pyro.set_rng_seed(0)
    runs = [SMC(setup.task.model, auto, num_particles=16).run(*setup.args).log_evidence for _ in range(30)]
    ratio = (torch.stack(runs) - exact.log_evidence).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 30**0.5).all()


def test_subsampled_observations_are_those_that_are_shown():
    """With the default prompt, a subsampled plate's texts go with their own observations."""
    lm = flat_lm(vocab=8, dtype=torch.float64)
    q = lm.with_adapter(CONFIG)
    x, y = lm.encode(["a", "b", "c", "d", "e"]), lm.encode(["aa", "bb", "cc", "dd", "ee"])

    def model():
        with pyro.plate("data", 5, subsample_size=2) as i:
            z = pyro.sample("z", Completion(lm, x[i], max_tokens=1))
            pyro.sample("y", Completion(lm, lm.join(x[i], z), max_tokens=2, stop=None), obs=y[i])

    for seed in range(5):
        pyro.set_rng_seed(seed)
        found = programs.trace(AutoGuide(model, q, separator="."), (), {}, nesting=1, particles=3)
        shown = lm.decode(found.nodes["z"]["fn"].prompt)
        assert shown == [f"{c}{c}.{c}" for c in ("abcde"[i] for i in found.nodes["data"]["value"])]


def test_observations_in_a_deeper_plate_are_joined(setup):
    lm, q = setup.lm, setup.q
    x, y = lm.encode(["a", "b"]), lm.encode([["a", "b"], ["bb", "ab"], ["c", "cc"]])  # (3, 2, L)

    def model():
        with pyro.plate("data", 2, dim=-1):
            z = pyro.sample("z", Completion(lm, x, max_tokens=1))
            with pyro.plate("answers", 3, dim=-2):
                pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=3), obs=y)

    found = programs.trace(AutoGuide(model, q, separator="."), (), {}, nesting=2, particles=3)
    assert lm.decode(found.nodes["z"]["fn"].prompt)[0] == ["abbc.a", "babcc.b"]


@pytest.mark.parametrize(
    ("template", "match"),
    [("{nothing}", "nothing"), ({"z": "{x}", "v": "{x}"}, "'v'"), ("{z}{x}", "'z'"), ("{n}", "field .n., got int")],
)
def test_bad_templates_are_named(setup, template, match):
    def model(x, y, n=3):
        return setup.task.model(x, y)

    with pytest.raises(ValueError, match=match):
        AutoGuide(model, setup.q, template)(*setup.args)


def test_a_base_model_without_an_adapter_is_refused(setup):
    with pytest.raises(ValueError, match="base model"):
        AutoGuide(setup.task.model, flat_lm(seed=9, vocab=6).with_adapter(CONFIG), TEMPLATE)(*setup.args)
