"""The law of a text with tools, by plain loops over its characters.

The tiny model's tokens are <eos>, 0, 1, "9+" and "1=", so that "9+1=" goes on with the two tokens of "10".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from reference import Law, Plain, Tokens
from tiny import tiny_lm
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.tools import Calculator

WORDS = ("<eos>", "0", "1", "9+", "1=")
EOS, ZERO, ONE, NINE_PLUS, ONE_IS = range(5)


def make_lm(seed: int = 0, arch: str = "gpt2") -> LanguageModel:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"9\+|1=|[01]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    return LanguageModel(tiny_lm(arch, vocab=len(WORDS), seed=seed, dtype=torch.float64).model, tokenizer)


LM = make_lm()
PLAIN = Plain(LM)
calculator = Calculator()


def one_after_nine(so_far: str) -> str | None:
    """What it inserts lets the calculator answer."""
    return "1=" if so_far.endswith("9+") else None


def opening(so_far: str) -> str | None:
    return None if so_far else "01"


def always(so_far: str) -> str:
    return "10"


TOOLS = {
    "calculator": (calculator,),
    "two tools": (calculator, one_after_nine),
    "the first that answers": (one_after_nine, lambda s: "0" if s.endswith(("9+", "01")) else ""),
    "from the beginning": (opening, calculator),
    "always": (always,),
    "ones": (lambda s: "11" if s.endswith("9+") else None,),
    "none": (),
}
RULES = {
    "plain": {},
    "min_tokens": {"min_tokens": 3, "temperature": 0.7},
    "two stops": {"stop": ["eos", "0"], "allowed": [EOS, ZERO, ONE, NINE_PLUS, ONE_IS]},
    "no stop": {"stop": None},
    "a constraint": {"allowed": [EOS, ONE, NINE_PLUS, ONE_IS]},
}


@dataclass
class ToolLaw(Law):
    """The law of one text with tools, by a loop over its characters so far."""

    tools: tuple = field(default=())
    inserted: dict[Tokens, list[int]] = field(default_factory=dict, init=False, repr=False)

    def pending(self, prefix: Tokens) -> list[int]:
        if prefix not in self.inserted:
            before = self.pending(prefix[:-1]) if prefix else []
            pending = before[1:] if before and before[0] == prefix[-1] else []
            so_far = "".join(WORDS[i] for i in prefix if i != EOS)
            answers = [tool(so_far) for tool in self.tools] if not pending else []
            answer = next((a for a in answers if a and set(a) <= set("01=")), "")  # what the vocabulary can spell
            self.inserted[prefix] = pending or LM.encode(answer).tolist()
        return self.inserted[prefix]

    def next(self, prefix: Tokens) -> Tensor:
        pending = self.pending(prefix)
        if not pending or len(prefix) >= self.max_tokens:
            return super().next(prefix)
        return torch.tensor([0.0 if v == pending[0] else -torch.inf for v in range(len(WORDS))])

    def tree(self, prefix: Tokens = (), log_p: float = 0.0) -> dict[Tokens, float]:
        """Every text of positive probability, found by growing; `Law.support` would list all strings."""
        if (prefix and prefix[-1] in self.stops) or (not self.stops and len(prefix) == self.max_tokens):
            return {prefix: log_p}
        found = {}
        for v, step in enumerate(self.step(prefix)):
            if step > -torch.inf:
                found |= self.tree((*prefix, v), log_p + step)
        return found


@cache
def law(tools: str, rules: str = "plain", max_tokens: int = 4, prompt: Tokens = (ONE,)) -> ToolLaw:
    given = dict(RULES[rules])
    stops = {"two stops": (EOS, ZERO), "no stop": ()}.get(rules, (EOS,))
    allowed = given.get("allowed")
    return ToolLaw(
        PLAIN,
        prompt,
        max_tokens,
        given.get("min_tokens", 0),
        stops,
        (lambda prefix: set(allowed)) if allowed else None,
        given.get("temperature", 1.0),
        tools=TOOLS[tools],
    )


@cache
def exact(tools: str, rules: str = "plain", max_tokens: int = 4) -> dict[Tokens, float]:
    return law(tools, rules, max_tokens).tree()


def completion(tools: str, rules: str = "plain", max_tokens: int = 4, lm: LanguageModel = LM, **more) -> Completion:
    return Completion(lm, "1", **{"max_tokens": max_tokens, "tools": TOOLS[tools], **RULES[rules], **more})


def spelled(z: Tensor) -> list[str]:
    return LM.decode(z)
