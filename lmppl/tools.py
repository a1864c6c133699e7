r"""Tools: functions that watch a text being written, and write the next piece of it themselves.

A tool is a function of the text so far, a string, that answers with what comes next, or None.  It sees what follows the
prompt, not the prompt, and must answer the same whenever it is asked.  `Completion(..., tools=...)` inserts its answer;
the mathematics is in `lmppl.distributions.insertions`.

    >>> Completion(lm, "Question: 6 - 0 - 4 = ? Answer:", max_tokens=30, stop=".", tools=[Calculator()])
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

__all__ = ["Calculator", "Tool", "evaluate"]

MAX_DEPTH = 20  # of parentheses and signs
MAX_MAGNITUDE = 10**18  # of the numerator and the denominator of every intermediate value


class Tool(Protocol):
    """What ``tools=`` takes: any function ``text so far -> what to insert``, None (or "") where it has nothing to say.

    A tool that has an attribute ``trigger``, a string, promises to answer only texts that end with it, and is not asked
    about others.

    >>> def capital(text: str) -> str | None:
    ...     return " Paris" if text.endswith("The capital of France is") else None
    """

    def __call__(self, text: str, /) -> str | None: ...


@dataclass(frozen=True)
class Calculator:
    """The tool that writes the value of an arithmetic expression: ``6 - 4 =`` goes on with `` 2``, ``6-4=`` with ``2``.

    The expression is the run of integers, ``+ - * /``, parentheses and spaces before ``trigger``.  It is left alone
    unless it has an operator, is well-formed, and its value is an integer; and where it goes on to the left (``x3+4=``,
    ``1.5+2=``, ``2^3+4=``).  Division is exact within it: ``7/2*4=`` is 14.

    A token that spells more than the end of the trigger (``=7``) passes the calculator by; forbid it by ``allowed``.

    :param trigger: what asks for the value.
    :param format: how it is written, with ``{}`` for the value; None: as it is, after a space where there is one before
        the trigger.
    :param max_length: the most characters of an expression.

        >>> Calculator()("6 - 0 =, 6 - 4 =")
        ' 2'
        >>> Calculator(format="{}>>")("It costs <<3*(2+5)=")
        '21>>'
    """

    trigger: str = "="
    format: str | None = None
    max_length: int = 100

    def __post_init__(self) -> None:
        if not self.trigger:
            raise ValueError("trigger: expected a string that asks for the value, got an empty one")
        if self.format is not None and self.format.count("{}") != 1:
            raise ValueError(f"format: expected one {{}} where the value goes, got {self.format!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length: expected a positive number of characters, got {self.max_length}")

    def __call__(self, text: str, /) -> str | None:
        if not text.endswith(self.trigger):
            return None
        before = text[: -len(self.trigger)]
        window = before[-self.max_length - 1 :]  # one more: what comes before the expression
        rest, expression = _last_expression(window)
        if len(expression) > self.max_length or _belongs_to_it(rest[-1:], expression):
            return None
        value = evaluate(expression) if _BINARY.search(expression) else None
        if value is None or value.denominator != 1:
            return None
        format = self.format or (" {}" if before.endswith(" ") else "{}")
        return format.replace("{}", str(value.numerator))


_BINARY = re.compile(r"[0-9)] *[-+*/]")  # an operator, not a sign


def _last_expression(text: str) -> tuple[str, str]:
    """A text in two: what comes before, and the run of an expression's characters at its end."""
    rest = text.rstrip("0123456789+-*/() ")
    return rest, text[len(rest) :]


def _belongs_to_it(character: str, expression: str) -> bool:
    """Whether an expression goes on to the left, by a character that the calculator does not know."""
    if character and character in "^%×÷·√":
        return True
    return not expression.startswith(" ") and (character.isalnum() or (character != "" and character in "_.,!"))


class _Malformed(Exception):
    pass


def evaluate(expression: str) -> Fraction | None:
    """The value of an arithmetic expression; None where it is malformed, divides by zero, or is too deep or too large.

    Integers, ``+ - * /`` with their usual precedence, signs, parentheses and spaces; nothing is executed.

    >>> evaluate("2 * (3 - 5) / 8")
    Fraction(-1, 2)
    """
    tokens = re.findall(r"[0-9]+|[^0-9\s]", expression)[::-1]  # the next one last
    try:
        value = _sum(tokens, MAX_DEPTH)
    except (_Malformed, ZeroDivisionError):
        return None
    return None if tokens else value


def _sum(tokens: list[str], depth: int) -> Fraction:
    value = _product(tokens, depth)
    while tokens and tokens[-1] in "+-":
        sign = 1 if tokens.pop() == "+" else -1
        value = _bounded(value + sign * _product(tokens, depth))
    return value


def _product(tokens: list[str], depth: int) -> Fraction:
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in "*/":
        times = tokens.pop() == "*"
        factor = _factor(tokens, depth)
        value = _bounded(value * factor if times else value / factor)
    return value


def _factor(tokens: list[str], depth: int) -> Fraction:
    token = tokens.pop() if tokens else ""
    if token.isascii() and token.isdigit() and len(token) <= len(str(MAX_MAGNITUDE)):
        return _bounded(Fraction(int(token)))
    if depth and token in ("+", "-"):
        return _factor(tokens, depth - 1) * (1 if token == "+" else -1)
    if depth and token == "(":
        value = _sum(tokens, depth - 1)
        if tokens and tokens.pop() == ")":
            return value
    raise _Malformed


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > MAX_MAGNITUDE:
        raise _Malformed
    return value
