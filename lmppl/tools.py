"""Tools: functions that read a text while it is written and insert the next piece of it.

A tool is a function of the text so far, a string. It returns the string that comes next, or None. It sees what follows
the prompt, not the prompt, and must always return the same for the same text. `Completion(..., tools=...)` inserts what
it returns; `lmppl.distributions.insertions` has the mathematics.

    >>> question = "Question: 6 - 0 - 4 = ? Answer:"
    >>> d = Completion(lm, question, max_tokens=30, stop=".", tools=[Calculator()])
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
    """What ``tools=`` accepts: any function from the text so far to the string to insert, or None for nothing.

    A tool may have an attribute ``trigger``, a string. Then it is called only for texts that end with the trigger.

    >>> def capital(text: str) -> str | None:
    ...     return " Paris" if text.endswith("The capital of France is") else None
    >>> capital("I know. The capital of France is")
    ' Paris'
    """

    def __call__(self, text: str, /) -> str | None: ...


@dataclass(frozen=True)
class Calculator:
    """The tool that inserts the value of an arithmetic expression: after ``6-4=`` it inserts ``2``.

    The expression is the run of integers, ``+ - * /``, parentheses and spaces before ``trigger``. Division is exact
    inside it: ``7/2*4=`` is 14. Nothing is inserted if the expression has no operator, is malformed, has a value that
    is not an integer, or continues to the left (``x3+4=``, ``1.5+2=``, ``2^3+4=``).

    A token that spells more than the end of the trigger (``=7``) bypasses the calculator; forbid such tokens by
    ``allowed``.

    :param trigger: the string after which the value is inserted.
    :param format: how the value is written, with ``{}`` in its place; None: the value alone, after a space if there is
        one before the trigger (``6 - 4 =``).
    :param max_length: the largest number of characters of an expression.
    :raises ValueError: if ``trigger`` is empty, ``format`` has not exactly one ``{}``, or ``max_length`` is below 1.

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
            raise ValueError("trigger: expected a string of one character or more, got ''")
        if self.format is not None and self.format.count("{}") != 1:
            raise ValueError(f"format: expected one {{}} where the value goes, got {self.format!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length: expected a positive number of characters, got {self.max_length}")

    def __call__(self, text: str, /) -> str | None:
        if not text.endswith(self.trigger):
            return None
        before = text[: -len(self.trigger)]
        window = before[-self.max_length - 1 :]  # one character more, to see what comes before the expression
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
    """Splits a text: what comes before, and the run of an expression's characters at its end."""
    rest = text.rstrip("0123456789+-*/() ")
    return rest, text[len(rest) :]


def _belongs_to_it(character: str, expression: str) -> bool:
    """Returns whether an expression continues to the left, with a character that the calculator does not know."""
    if character and character in "^%×÷·√":
        return True
    return not expression.startswith(" ") and (character.isalnum() or (character != "" and character in "_.,!"))


class _Malformed(Exception):
    pass


def evaluate(expression: str) -> Fraction | None:
    """Returns the value of an arithmetic expression, or None.

    It is None if the expression is malformed, divides by zero, or is too deep or too large. An expression has integers,
    ``+ - * /`` with their usual precedence, signs, parentheses and spaces. No code is executed.

    :param expression: a string, such as "2 * (3 - 5) / 8".
    :returns: a Fraction, or None.

    >>> evaluate("2 * (3 - 5) / 8")
    Fraction(-1, 2)
    """
    tokens = re.findall(r"[0-9]+|[^0-9\s]", expression)[::-1]  # reversed: the next token is the last
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
