"""Constraints, each with what plain Python says of the texts that it accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from reference import Tokens
from tiny import flat_lm
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel, constraints
from lmppl.constraints import Check, ban, every, grammar, json_schema, only, regex, without, words
from lmppl.distributions import Completion
from lmppl.text import PAD


def spelled_lm(*tokens: str, seed: int = 0) -> LanguageModel:
    """A tiny network whose tokens are eos (0) and these strings."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<eos>", *tokens))}))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return LanguageModel(flat_lm(vocab=max(8, len(tokens) + 1), seed=seed).model, tokenizer)


AB = spelled_lm(".", "a", "b", "ab", "ba", "abb", "<eos")  # one text, many ways to cut it; the last is no eos
JSON = spelled_lm("true", "tr", "ue", "10", "-", "[", "]", ",")
BRACKETS = spelled_lm("(", ")", "()", "((", "x", ".", "))")
BOOLEANS = {"type": "array", "items": {"type": "boolean"}}


@dataclass(frozen=True)
class Case:
    """A constraint, and whether a text (its tokens; its string, eos dropped) is accepted, in plain Python."""

    lm: LanguageModel
    make: Callable[[], constraints.Constraint]
    accepts: Callable[[Tokens, str], bool]
    stop: str | list[str] = "eos"
    max_tokens: int = 3
    tight: bool = True  # whatever is allowed can be completed, within a token more than max_tokens

    @property
    def stops(self) -> Tokens:
        return tuple(self.lm.stop_ids(self.stop).tolist())

    def completion(self, **kwargs) -> Completion:
        given = {"max_tokens": self.max_tokens, "stop": self.stop, "allowed": self.make(), "temperature": 3.0}
        return Completion(self.lm, self.prompt, **given | kwargs)

    @property
    def prompt(self) -> Tensor:
        return torch.tensor([2, 3])

    def texts(self, most: int | None = None) -> list[Tokens]:
        """Every text of at most ``most`` tokens and a stop."""
        content = [v for v in range(self.lm.vocab_size) if v not in self.stops]
        lengths = range((self.max_tokens if most is None else most) + 1)
        return [(*body, s) for n in lengths for body in product(content, repeat=n) for s in self.stops]

    def says(self, z: Tokens) -> bool:
        return self.accepts(z, self.lm.vocabulary.decode(list(z)))


def matches(pattern: str) -> Callable[[Tokens, str], bool]:
    """No eos inside, and a match from beginning to end."""
    return lambda z, s: 0 not in z[:-1] and re.fullmatch(pattern, s, re.DOTALL) is not None


def is_json(of: Callable[[object], bool]) -> Callable[[Tokens, str], bool]:
    def accepts(z: Tokens, s: str) -> bool:
        try:
            return 0 not in z[:-1] and of(json.loads(s))
        except ValueError:
            return False

    return accepts


def balanced(z: Tokens, s: str) -> bool:
    while "()" in s:
        s = s.replace("()", "")
    return not s and 0 not in z[:-1]


def no_repeat(prefix: Tensor, token: Tensor) -> Tensor:
    return prefix[:, -1] != token if prefix.shape[1] else torch.ones_like(token, dtype=torch.bool)


def in_turn(z: Tokens, s: str) -> bool:
    return all(a != b for a, b in zip(z, z[1:], strict=False))


CASES = {
    "only": Case(AB, lambda: only(AB, ["a", "ab", 0]), lambda z, s: set(z) <= {0, 2, 4}),
    "ban": Case(AB, lambda: ban(AB, ["b", "."]), lambda z, s: not {1, 3} & set(z)),
    "regex": Case(AB, lambda: regex(AB, "(ab)+b?"), matches("(ab)+b?")),
    "regex, empty": Case(AB, lambda: regex(AB, "(?:a|ab)*"), matches("(?:a|ab)*")),
    "regex, spoken stop": Case(AB, lambda: regex(AB, r"(ab|b)+\.", "."), matches(r"(ab|b)+\."), "."),
    "regex, two stops": Case(
        AB, lambda: regex(AB, r"a[ab]*\.?", ["eos", "."]), matches(r"a[ab]*\.?"), ["eos", "."], tight=False
    ),
    "regex, spelled eos": Case(AB, lambda: regex(AB, "(<eos|a)+"), matches("(<eos|a)+")),
    "json": Case(
        JSON,
        lambda: json_schema(JSON, BOOLEANS),
        is_json(lambda x: isinstance(x, list) and all(b is True for b in x)),
        max_tokens=4,
    ),
    "json number": Case(
        JSON,
        lambda: json_schema(JSON, '{"type": "integer", "maximum": 10}'),
        is_json(lambda x: type(x) is int and x <= 10),
    ),
    "grammar": Case(BRACKETS, lambda: grammar(BRACKETS, 'start: "(" start ")" start | ""'), balanced, max_tokens=4),
    "words": Case(AB, lambda: words(AB, ["ab", "b."], ["eos"]), matches(r"(ab|b\.)*")),
    "without": Case(AB, lambda: without(AB, ["ba", "<"]), matches("((?!ba|<).)*")),
    "every": Case(
        AB,
        lambda: every(regex(AB, "(ab|ba)+"), without(AB, ["bb"]), ban(AB, ["<eos"])),
        matches("(?!.*bb)(ab|ba)+"),
        tight=False,
    ),
    "check": Case(AB, lambda: Check(AB, no_repeat), in_turn),
    "check within": Case(
        AB,
        lambda: every(Check(AB, no_repeat, patience=3), regex(AB, "[ab]+"), ban(AB, ["abb"])),
        lambda z, s: in_turn(z, s) and matches("[ab]+")(z, s) and 6 not in z,
    ),
    "function": Case(
        AB,
        lambda: (
            lambda prefix: (
                ~torch.nn.functional.one_hot(prefix[..., -1], 8).bool()
                if prefix.shape[-1]
                else torch.ones(8, dtype=torch.bool)
            )
        ),
        in_turn,
    ),
}


def tensor(texts: list[Tokens]) -> Tensor:
    width = max(len(z) for z in texts)
    return torch.tensor([z + (PAD,) * (width - len(z)) for z in texts])
