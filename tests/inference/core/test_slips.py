"""Common slips: one clear line, which says what to write."""

from __future__ import annotations

import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from tiny import flat_lm
from typer.testing import CliRunner

from lmppl import LanguageModel, check, constraints, text
from lmppl.cli import Failure, app
from lmppl.distributions import Completion, NextToken
from lmppl.inference import (
    SMC,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    Posterior,
    Replay,
    SubTB,
    VarGrad,
    compare,
    diagnose,
)

LM = flat_lm(vocab=6)  # <eos> . a b c d
X, Y = torch.tensor([[2], [3]]), torch.tensor([[3, 0], [2, 0]])


def model(x=X, y=Y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", Completion(LM, x, max_tokens=1))
        pyro.sample("y", Completion(LM, LM.join(x, z), max_tokens=1), obs=y)


def completion(**options):
    return lambda: Completion(**{"lm": LM, "prompt": X, "max_tokens": 2, **options})


def fit(**options):
    q = torch.nn.Parameter(torch.zeros(()))
    return GFlowNet(model, model, optimizer=torch.optim.SGD([q])).fit([(X, Y)], 1, progress=False, **options)


def posterior():
    return Importance(model, num_particles=2).run()


SLIPS = {
    "a name": ("lm: .*'gpt2'.*from_pretrained", completion(lm="gpt2")),
    "a name, next token": ("lm: .*'gpt2'", lambda: NextToken("gpt2", X)),
    "a bare network": (r"lm: .*LanguageModel\(model, tokenizer\)", completion(lm=LM.model)),
    "data for a guide": (r"guide: .*\.run\(", lambda: Importance(model, X)),
    "data for a guide, SMC": (r"guide: .*\.run\(", lambda: SMC(model, X)),
    "data for a guide, MCMC": (r"guide: .*\.run\(", lambda: MetropolisHastings(model, X)),
    "data for a model": (r"model: .*\.run\(", lambda: Enumeration(X)),
    "particles: true": ("num_particles", lambda: Importance(model, num_particles=True)),
    "particles: a string": ("num_particles", lambda: Importance(model, num_particles="8")),
    "plates: a name": ("max_plate_nesting: .*'data'", lambda: Importance(model, max_plate_nesting="data").run()),
    "plates: 2.5": ("max_plate_nesting: .*2.5", lambda: SMC(model, max_plate_nesting=2.5).run()),
    "plates: too many": ("max_plate_nesting: .*10000", lambda: SMC(model, max_plate_nesting=10_000).run()),
    "threshold: a string": ("ess_threshold: .*'half'", lambda: SMC(model, ess_threshold="half")),
    "resampling: a list": ("resampling: .*multinomial", lambda: SMC(model, resampling=["multinomial"])),
    "seed: too large": ("seed: .*43 bits", lambda: fit(seed=10**30)),
    "log: a number": ("log: .*2.5", lambda: fit(log=2.5)),
    "checkpoint: a list": (r"checkpoint: .*\['a'\]", lambda: fit(checkpoint=["a"])),
    "callback: a string": ("callback: .*'print'", lambda: fit(callback="print")),
    "held_out: a number": ("held_out: .*2.5", lambda: fit(held_out=2.5)),
    "held_out: a tensor": ("held_out: .*tensor", lambda: fit(held_out=torch.tensor(1))),
    "floor: a string": ("floor: .*'50'", lambda: VarGrad(floor="50")),
    "lam: none": ("lam: .*None", lambda: SubTB(lam=None)),
    "distance: a string": ("min_distance: .*'0'", lambda: Replay(min_distance="0")),
    "repetitions: 2.5": ("repetitions: .*2.5", lambda: compare(model, {"a": Importance(model)}, repetitions=2.5)),
    "compare: data for a model": ("model: .*a tensor", lambda: compare(X, {"a": Importance(model)})),
    "check: steps": ("steps: .*2.5", lambda: check(model, None, steps=2.5)),
    "check: learning rate": ("learning_rate: .*'fast'", lambda: check(model, None, learning_rate="fast")),
    "load: a number": ("path: .*2.5", lambda: Posterior.load(2.5)),
    "save: none": ("path: .*None", lambda: posterior().save(None)),
    "candidates: a number": ("candidates: .*3", lambda: posterior().predict(model, 3)),
    "predict: a site's list": (r"site: \['y'\]", lambda: posterior().predict(model, ["a"], site=["y"])),
    "predict: data": ("model: .*a tensor", lambda: posterior().predict(X, ["a"])),
    "predictive: a name": ("model: .*'model'", lambda: posterior().predictive("model")),
    "keep: a number": ("keep: .*2.5", lambda: posterior().predictive(model, keep=2.5)),
    "scheme: a list": (r"scheme: .*\['systematic'\]", lambda: posterior().resample(2, ["systematic"])),
    "seed": ("seed: .*2.5", lambda: fit(seed=2.5)),
    "seed: of diagnose": ("seed: .*'x'", lambda: diagnose(Importance(model), X, Y, seed="x")),
    "temperature: a string": ("temperature: .*'1'", completion(temperature="1")),
    "temperature: a truth": ("temperature: .*True", completion(temperature=True)),
    "temperature: NaN tensor": ("temperature", completion(temperature=torch.tensor([1.0, torch.nan]))),
    "max_tokens: a string": ("max_tokens: .*'5'", completion(max_tokens="5")),
    "max_tokens: true": ("max_tokens", completion(max_tokens=True)),
    "max_tokens: none": ("max_tokens", completion(max_tokens=None)),
    "max_tokens: negative": ("max_tokens", completion(max_tokens=-1)),
    "min_tokens: a list": ("min_tokens", completion(min_tokens=["a"])),
    "prompt: floats": ("prompt", completion(prompt=X.float())),
    "prompt: list of tensors": ("prompt", completion(prompt=[X[0], X[1]])),
    "stop: bytes": (r"stop=b'\.'.*write '\.'", completion(stop=b".")),
    "stop: bytes among others": (r"stop=b'\.'", completion(stop=["eos", b"."])),
    "stop: of encode": (r"stop=b'\.'", lambda: LM.encode("a", stop=b".")),
    "allowed: a number": ("allowed: .*2.5", completion(allowed=2.5)),
    "allowed: strings": (r"allowed: .*\['a'\]", completion(allowed=["a"])),
    "tools: a number": ("tools: .*7", completion(tools=7)),
    "tools: none": ("tools: .*None", completion(tools=None)),
    "words: a number": ("words: .*2.5", lambda: constraints.words(LM, 2.5)),
    "strings: none": ("strings: .*None", lambda: constraints.without(LM, None)),
    "tokens: a number": ("tokens: .*3", lambda: constraints.ban(LM, 3)),
    "a name, regex": ("lm: .*'gpt2'.*from_pretrained", lambda: constraints.regex("gpt2", "a")),
    "a name, words": ("lm: .*'gpt2'", lambda: constraints.words("gpt2", ["a"])),
    "a name, only": ("lm: .*'gpt2'", lambda: constraints.only("gpt2", ["a"])),
    "a name, slots": ("lm: .*'gpt2'", lambda: constraints.Slots("gpt2", [["a"]])),
    "a name, check": ("lm: .*'gpt2'", lambda: constraints.Check("gpt2", lambda prefix, token: token > 0)),
    "a name for a network": ("model: .*str", lambda: LanguageModel("gpt2", LM.tokenizer)),
    "a name for a tokenizer": ("tokenizer: .*str", lambda: LanguageModel(LM.model, "gpt2")),
    "a number for a name": ("name_or_path: .*2.5", lambda: LanguageModel.from_pretrained(2.5)),
    "a list for a name": (r"name=\['stories'\]", lambda: LanguageModel.embedded(["stories"])),
    "text: a string": ("text must be a LongTensor.*str", lambda: text.length("a b")),
    "text: floats": ("texts must be a LongTensor.*float32", lambda: text.cat(X, X.float())),
    "text: a number": ("b must be a LongTensor", lambda: text.equal(X, torch.tensor(3))),
    "width: a float": ("width: .*2.5", lambda: text.pad(X, 2.5)),
    "stop: a string": ("stop: .*'eos'", lambda: text.prefixes(X, "eos")),
    "f: a string": ("f: .*'len'", lambda: text.map("len", X, LM)),
    "f: none for a text": ("f: .*'a', got None", lambda: text.map(lambda s: None, X, LM)),
    "words: a string": (r"words: .*'He'.*\['He'\]", lambda: constraints.words(LM, "He")),
    "template: a brace": ("template: '{'", lambda: LM.fill("{")),
    "value: a string": (r"value: .*write lm\.encode\('ab'", lambda: Completion(LM, X, max_tokens=2).log_prob("ab")),
}


@pytest.mark.parametrize("case", SLIPS)
def test_slips(case):
    said, call = SLIPS[case]
    with pytest.raises(ValueError, match=said) as found:
        call()
    assert "\n" not in str(found.value)


def test_one_string_is_one_token_not_its_letters():
    """A word in the place of a list of words: its letters may be tokens too, and would be banned without a word."""
    ab = flat_lm(vocab=6)  # <eos> . a b c d
    assert torch.equal(constraints.ban(ab, "a"), constraints.ban(ab, ["a"]))
    with pytest.raises(ValueError, match="tokens: .*'ab'"):
        constraints.ban(ab, "ab")


def test_infinitely_many_axes_of_plates_are_guessed_as_pyro_does():
    for algorithm in (Importance, SMC):
        found = [algorithm(model, num_particles=2, max_plate_nesting=n).run().log_weights.shape for n in (1, torch.inf)]
        assert found[0] == found[1] == (2, 2)


def of_k(use):
    def program():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        use(k)

    return program


@pytest.mark.parametrize("use", [lambda k: {0: "a", 1: "b"}[k], lambda k: f"{k:d}", round, lambda k: divmod(k, 2)])
@pytest.mark.parametrize("run", [Importance, SMC])
def test_a_look_up_or_a_rounding_of_a_latent_is_told_what_to_write(use, run):
    with pytest.raises(ValueError, match=r"(?s)^model or guide: `.{1,110}` \(line .*needs one Python value") as found:
        run(of_k(use), num_particles=4).run()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (lambda: pyro.sample("k", dist.Normal(0.0, -1.0)), "scale of a Normal is -1.*; expected GreaterThan"),
        (lambda: model(X[:0], Y[:0]), "pyro.plate.* has no element"),
    ],
)
def test_what_pyro_says_in_several_lines_is_said_in_one_with_the_line_of_the_program(program, said):
    for algorithm in (Importance, SMC):
        with pytest.raises(ValueError, match=f"^model or guide: `.*{said}") as found:
            algorithm(program, num_particles=3).run()
        assert "\n" not in str(found.value)


RUNS = {
    "importance": lambda m: Importance(m, num_particles=3).run(),
    "smc": lambda m: SMC(m, num_particles=3).run(),
    "enumeration": lambda m: Enumeration(m).run(),
    "metropolis": lambda m: MetropolisHastings(m, num_chains=2, num_samples=2, warmup=1).run(),
}


@pytest.mark.parametrize("run", RUNS)
def test_observed_strings_are_told_how_to_be_encoded(run):
    def observed(stop, y):
        def program():
            z = pyro.sample("z", Completion(LM, X[0], max_tokens=1))
            pyro.sample("y", Completion(LM, LM.join(X[0], z), max_tokens=2, stop=stop), obs=y)

        return program

    cases = (
        (observed("eos", "ab"), r"site 'y': .*write lm\.encode\('ab', stop='eos'\)"),
        (observed(".", "ab"), r"site 'y': .*write lm\.encode\('ab', stop='\.'\)"),
        (observed(None, "ab"), r"site 'y': .*write lm\.encode\('ab'\)"),
        (observed("eos", ["ab", "b"]), r"site 'y': .*write lm\.encode\(\['ab', 'b'\], stop='eos'\)"),
        (observed("eos", 3), "site 'y': expected a text"),
        (pyro.condition(model, {"y": "ab"}), r"site 'y': .*write lm\.encode\('ab', stop='eos'\)"),
        (pyro.condition(observed("eos", Y[0]), {"z": "a"}), r"site 'z': .*write lm\.encode\('a', stop='eos'\)"),
    )
    for program, said in cases:
        with pytest.raises(ValueError, match=said):
            RUNS[run](program)


@pytest.mark.parametrize(
    "arguments",
    [
        ["infilling", "--set", "template={"],
        ["infilling", "--set", "template=5"],
        ["continuation", "--set", "temperature=warm"],
        ["continuation", "--set", "temperature=true"],
        ["continuation", "--set", 'temperature=["a"]'],
        ["continuation", "--set", "temperature=NaN"],
        ["continuation", "--set", "max_tokens=2.5"],
        ["continuation", "--set", "max_tokens=-1"],
        ["random_number", "--set", "unseen=perhaps"],
        ["random_number", "--set", "target=7"],
        ["subjectivity", "--set", "count=1e3"],
        ["subjectivity", "--set", "reads=null"],
        ["arithmetic", "--set", "warm_start=[1]"],
        ["constrained", "--set", 'words={"a": 1}'],
        ["infilling", "--threads", str(100_000)],
    ],
)
def test_a_bad_option_never_ends_in_a_traceback(arguments, tmp_path):
    found = CliRunner().invoke(app, ["train", *arguments, "--steps", "1", "--out", str(tmp_path)])
    assert isinstance(found.exception, Failure | ValueError), repr(found.exception)
    assert arguments[2].partition("=")[0] in str(found.exception) or "threads" in str(found.exception)


def test_threads_are_those_of_the_machine():
    before = torch.get_num_threads()
    found = CliRunner().invoke(app, ["train", "none", "--threads", str(os.cpu_count())])
    torch.set_num_threads(before)
    assert "no model" in str(found.exception)
