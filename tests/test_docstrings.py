"""Every example of a docstring runs: blocks after "::", and ``>>>`` with the values that they show.

The names that examples use are in `names`: a language model, an adapter, a model and a guide of texts z between x and
y.  Trainings and chains are cut short.  `test_documented.py` checks what a docstring must contain.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import string
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from ngrams import ngram_lm
from peft import LoraConfig
from pyro import poutine
from tiny import tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lmppl
from lmppl import LanguageModel, MaskedLanguageModel, constraints, distributions, embedded, inference, ngram, text
from lmppl.models import Subjectivity
from lmppl.testing import TextContract

ROOT = Path(lmppl.__file__).parent
NOT_RUN = {
    "pretrained.py: smollm2": "it loads a pretrained model",
    "view.py: View.from_pretrained": "it loads a pretrained model, on an accelerator",
    "masked_language_model.py: MaskedLanguageModel.from_pretrained": "it loads a pretrained model, on an accelerator",
    "models/budget.py: plan": "it trains for half a minute; tests/models/test_budget.py does so for no time",
}


def documented(path: Path) -> dict[str, tuple[str, str]]:
    """The docstrings of a module, its classes and functions by "file: name", each with its module's name."""
    tree, module = ast.parse(path.read_text()), ".".join(["lmppl", *path.relative_to(ROOT).with_suffix("").parts])
    found = [("module", ast.get_docstring(tree)), *within(tree)]
    return {f"{path.relative_to(ROOT)}: {name}": (doc, module.removesuffix(".__init__")) for name, doc in found if doc}


def within(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """The docstrings below a node by qualified name, as in "SMC.run"."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield f"{prefix}{child.name}", ast.get_docstring(child)
            yield from within(child, f"{prefix}{child.name}.")


DOCUMENTED = {k: v for path in sorted(ROOT.rglob("*.py")) for k, v in documented(path).items()}
BLOCK = re.compile(r"::\n\n((?: {4}.*\n|\n)+)")


def blocks(doc: str) -> list[str]:
    """The indented blocks after a line that ends with "::", without those of ``>>>``."""
    found = [textwrap.dedent(block) for block in BLOCK.findall(doc + "\n")]
    return [block for block in found if not block.lstrip().startswith(">>>")]


BLOCKS = {name: doc for name, (doc, _) in DOCUMENTED.items() if blocks(doc)}
ASKED = {name: doc for name, (doc, _) in DOCUMENTED.items() if ">>>" in doc}


def shortened(code: str) -> str:
    code = re.sub(r"(\.fit\(\w+, )\d+", r"\g<1>4", code)
    return re.sub(r"\b(steps|num_samples|warmup)=\d+", r"\1=4", code)


WORDS = (" He", " She", " red", " green", " apple", " sharpened", " swung", " it")


def spelling_lm() -> LanguageModel:
    """A tiny random network that can write everything: a token for each character, and for some words."""
    pieces = ["<eos>", *string.printable, *WORDS]
    backend = Tokenizer(models.Unigram([(p, -float(len(p) > 0)) for p in pieces], unk_id=0))
    backend.decoder = decoders.Fuse()
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(tiny_config("gpt2", len(pieces), max_length=256, layers=1))
    return LanguageModel(network, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


def chat_lm() -> LanguageModel:
    lm = spelling_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return lm


def names(max_tokens: int = 1) -> dict[str, Any]:
    """What examples speak of: z ~ LM(x) of at most ``max_tokens`` tokens, y ~ LM(x z); x and y of two observations."""
    lm = spelling_lm()
    q = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear"))

    def model(x, y=None):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", distributions.Completion(lm, x, max_tokens=max_tokens))
            pyro.sample("y", distributions.Completion(lm, lm.join(x, z), max_tokens=2), obs=y)

    def guide(x, y=None):
        with pyro.plate("stories", len(x)):
            prompt = x if y is None else q.join(y, x)
            pyro.sample("z", distributions.Completion(q, prompt, max_tokens=max_tokens))

    def masked(x, y=None):
        with pyro.plate("stories", len(x)):
            some = constraints.only(lm, ["a", "b", "eos"])
            pyro.sample("z", distributions.Completion(lm, x, max_tokens=max_tokens, allowed=some))

    def author(x):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", distributions.Completion(lm, x, max_tokens=max_tokens))

    x, y = lm.encode(["once", "the"]), lm.encode(["ab", "c"], stop="eos")
    optimizer = torch.optim.AdamW(q.trainable_parameters(), lr=1e-3)
    context = {name: getattr(m, name) for m in (constraints, distributions, inference) for name in m.__all__}
    context |= {"torch": torch, "pyro": pyro, "poutine": poutine, "lmppl": lmppl, "text": text, "embedded": embedded}
    context |= {"LanguageModel": LanguageModel, "LoraConfig": LoraConfig, "Path": Path, "TextContract": TextContract}
    context |= {"lm": lm, "q": q, "x": x, "y": y, "z": lm.encode(["a", "b"], stop="eos"), "optimizer": optimizer}
    context |= {"chosen": context["z"], "rejected": lm.encode(["b", "a"], stop="eos")}
    context |= {"model": model, "guide": guide, "masked": masked, "author": author, "batches": [(x, y)]}
    context |= {"questions": x, "answers": y, "other_questions": lm.encode(["who", "when"]), "context": x}
    context["posterior"] = inference.Importance(model, guide, num_particles=20).run(x, y)
    context |= {"gflownet": inference.GFlowNet(model, guide, optimizer=optimizer), "prompt": x, "prefix": x}
    context |= {"template": "Ending:{y} Beginning:{x} Middle:", "logits": torch.zeros(2), "Subjectivity": Subjectivity}
    return context


def with_labels(context: dict[str, Any]) -> dict[str, Any]:
    lm = LanguageModel.embedded("subjectivity")
    x, new = (lm.encode([s.text for s in embedded.data("subjectivity", split)[:2]]) for split in ("train", "test"))
    y = lm.encode([" subjective", " objective"], stop="eos")
    return {"lm": lm, "x": x, "y": y, "x_new": new, "batches": [(x, y)]}


def with_adapters(context: dict[str, Any]) -> dict[str, Any]:
    found = with_labels(context)
    config = LoraConfig(r=2, target_modules="all-linear")
    return found | {"adapters": [found["lm"].with_adapter(config) for _ in range(2)]}


def with_topics(context: dict[str, Any]) -> dict[str, Any]:
    def model(counts):
        topics = pyro.plate("topics", 2, dim=-1)
        with topics:
            words = pyro.sample("words", dist.Beta(1.0, 1.0))
        with pyro.plate("documents", len(counts), dim=-1):
            topic = pyro.sample("topic", dist.Bernoulli(0.5))
            p = torch.where(topic == 1, words[..., 1:], words[..., :1])
            pyro.sample("counts", dist.Binomial(10, p), obs=counts)

    return {"posterior": inference.Importance(model, num_particles=20).run(torch.tensor([1.0, 2.0, 8.0, 9.0]))}


class Mine(distributions.AutoregressiveText):
    def __init__(self, probs):
        self.probs = probs
        super().__init__(["a", "b"], (2,), max_tokens=2, stop=None)

    def next_logits(self, prefix, element):
        return self.probs[element].log()


def without_texts(context: dict[str, Any]) -> dict[str, Any]:
    """A hundred runs of it are quick."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x))
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * z), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * y))

    return {"model": model, "guide": guide, "x": torch.tensor([0.3, 0.6]), "y": torch.tensor([1.0, 0.0])}


def guide_lm(context: dict[str, Any]) -> dict[str, Any]:
    return {"guide": context["lm"].with_adapter(LoraConfig(r=2, target_modules="all-linear"))}


def with_gaps(context: dict[str, Any]) -> dict[str, Any]:
    lm = MaskedLanguageModel.embedded("masked_stories")
    x, y = lm.encode("Tom went to the attic."), lm.encode(" He oiled it.")
    d = distributions.Unmasking(lm, lm.join(x, lm.gap(6), y))
    path = d.sample()
    return {"lm": lm, "x": x, "y": y, "d": d, "path": path, "words": d.words(path)}


OF_THEIR_OWN = {
    "distributions/unmasking.py: Unmasking": with_gaps,
    "distributions/unmasking.py: Unmasking.symbols": with_gaps,
    "distributions/unmasking.py: Unmasking.text_log_prob": with_gaps,
    **{
        f"distributions/unmasking.py: Unmasking.{name}": with_gaps
        for name in ("words", "fill", "decode", "placeholder", "broadened", "token_steps", "log_prob")
    },
    "masked_language_model.py: MaskedLanguageModel.gap": with_gaps,
    "encoding.py: Encoding.chat": lambda c: {"lm": chat_lm()},
    "inference/training/em.py: VariationalEM": with_labels,
    "inference/training/gflownet/replay.py: Replay": lambda c: names(max_tokens=20),
    "inference/training/loop/stopping.py: StopTraining": lambda c: {"step": 0, "metrics": {"sd_u": 1.0}},
    "inference/samplers/smc/ancestry.py: plot_ancestry": lambda c: names(max_tokens=4),
    "inference/samplers/markov.py: Markov": lambda c: {"lm": ngram_lm()},
    "inference/posterior/ensemble.py: Ensemble": with_adapters,
    "inference/posterior/posterior.py: Posterior.table": with_topics,
    "models/programs/subjectivity.py: Subjectivity": with_labels,
    "ngram.py: NGram": lambda c: vars(ngram) | {"tokenizer": tiny_tokenizer(6)},
    "testing.py: TextContract": lambda c: {"Mine": Mine},
    "inference/judging/diagnose.py: diagnose": without_texts,
    "view.py: View.remove_adapter": guide_lm,
    "view.py: View.trainable_parameters": guide_lm,
    "constraints/check.py: Check": lambda c: {"spelling_is_fine": lambda prefix, token: token != 5},
    "constraints/masks.py: PrefixConstraint.log_indicator": lambda c: {
        "constraint": c["Slots"](c["lm"], [["a", "b"], ["c"]])
    },
    "models/classifier.py: TokenClassifier": lambda c: {"texts": ["a tree", "a car"], "labels": [True, False]},
}


@cache
def common() -> dict[str, Any]:
    return names()


def prepared(name: str) -> dict[str, Any]:
    """A namespace for the example: what its module imports, what is common, what the module defines, its own."""
    module = import_module(DOCUMENTED[name][1])
    imported = {k: v for k, v in vars(module).items() if not k.startswith("__")}
    defined = {k: v for k, v in imported.items() if getattr(v, "__module__", None) == module.__name__}
    context = imported | common() | defined
    return context | (OF_THEIR_OWN[name](context) if name in OF_THEIR_OWN else {}) | {"__name__": "example"}


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - set(NOT_RUN)))
def test_a_block_runs(name, tmp_path, monkeypatch):
    """So do the functions that it defines, with the arguments that they name."""
    monkeypatch.chdir(tmp_path)
    context = prepared(name)
    for block in blocks(BLOCKS[name]):
        before = dict(context)
        exec(compile(shortened(block), name, "exec"), context)
        own = [f for k, f in context.items() if inspect.isfunction(f) and before.get(k) is not f]
        for f in own:
            if f.__name__ != "<lambda>":
                f(*(context[argument] for argument in inspect.signature(f).parameters))


def answer(example: doctest.Example, context: dict[str, Any]) -> None:
    if example.want.startswith("ValueError: "):
        with pytest.raises(ValueError, match=re.escape(example.want.removeprefix("ValueError: ").strip())):
            exec(example.source, context)
    elif example.want:
        assert repr(eval(example.source, context)) == example.want.strip()
    else:
        exec(example.source, context)


@pytest.mark.parametrize("name", sorted(set(ASKED) - set(NOT_RUN)))
def test_what_is_asked_is_answered(name, tmp_path, monkeypatch):
    """As it is written, where an answer is."""
    monkeypatch.chdir(tmp_path)
    context = prepared(name)
    examples = doctest.DocTestParser().get_examples(ASKED[name])
    with poutine.trace():
        for example in examples:
            answer(example, context)


def test_nothing_is_left_out_that_is_not_there():
    assert set(NOT_RUN) <= set(BLOCKS) | set(ASKED) and set(OF_THEIR_OWN) <= set(BLOCKS) | set(ASKED)
    assert len(BLOCKS) > 30 and len(ASKED) > 30
