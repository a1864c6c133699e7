"""Common slips: one clear line, which says what to write."""

from __future__ import annotations

import os

import pyro
import pytest
import torch
from tiny import tiny_lm
from typer.testing import CliRunner

from lmppl import constraints
from lmppl.cli import Failure, app
from lmppl.distributions import Completion, NextToken
from lmppl.inference import SMC, Enumeration, GFlowNet, Importance, MetropolisHastings, diagnose

LM = tiny_lm(vocab=6)  # <eos> . a b c d
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
