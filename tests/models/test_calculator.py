"""The calculator against Python's fractions."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tool_law import calculator

from lmppl.tools import MAX_DEPTH, Calculator, evaluate


@pytest.mark.parametrize(
    ("so_far", "answer"),
    [
        ("3+4=", "7"),
        ("3 + 4 =", " 7"),
        ("6 - 0 =, 6 - 4 =", " 2"),
        ("1-9=", "-8"),
        ("so 2*(3+4)=", "14"),
        ("so: 2*(3+4)=", "14"),
        ("7/2*4=", "14"),
        ("-2*-3=", "6"),
        ("1+2=3+4=", "7"),
        ("Step 1. 3+4=", "7"),
        ("x\n3+4=", "7"),
        ("007+1=", "8"),
        ("3+4", None),
        ("3+4= ", None),
        ("3+4=7", None),
        ("=", None),
        ("", None),
        ("12=", None),
        ("-3=", None),
        ("7/2=", None),
        ("1/0=", None),
        ("1/(3-3)=", None),
        ("3 4+5=", None),
        ("(3+4=", None),
        ("3+4)=", None),
        ("()+1=", None),
        ("3+=", None),
        ("2**3=", None),
        ("6//2=", None),
        ("x3+4=", None),
        ("1.5+2=", None),
        ("1,000+2=", None),
        ("2^3+4=", None),
        ("2 ^ 3+4=", None),
        ("5%3+4=", None),
        ("3!-1+2=", None),
        ("٣+4=", None),
        ("é3+4=", None),
        ("1+" * 49 + "1=", "50"),
        ("1+" * 50 + "1=", None),  # too long
        ("1" * 5000 + "+1=", None),
        ("9" * 18 + "+1=", "1" + "0" * 18),
        ("9" * 18 + "*9=", None),  # too large
        ("9" * 18 + "*9-" + "9" * 18 + "*9=", None),  # on the way, too
        ("(" * 20 + "1+1" + ")" * 20 + "=", "2"),
        ("(" * 21 + "1+1" + ")" * 21 + "=", None),  # too deep
        ("-" * 60 + "1+1=", None),
        ("(" * 100_000 + "=", None),
    ],
)
def test_the_calculator_answers(so_far, answer):
    assert calculator(so_far) == answer


def test_triggers_and_formats():
    assert Calculator(trigger=" ->")("3+4 ->") == "7"
    assert Calculator(format="{}>>")("<<3+4=") == "7>>"
    assert Calculator(max_length=3)("1+2=") == "3" and Calculator(max_length=3)("11+2=") is None


def expressions() -> st.SearchStrategy[tuple[str, Fraction | None, bool]]:
    """Expressions, in full parentheses or few; their values by Python's fractions, None for a division by zero; and
    whether they have an operator of two operands."""
    ways = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    rank = {"+": 1, "-": 1, "*": 2, "/": 2}

    def combine(children):
        def joined(left, op, right, space, parentheses):
            (a, x, i, _), (b, y, j, _) = left, right
            a = f"({a})" if parentheses or i < rank[op] else a
            b = f"({b})" if parentheses or j <= rank[op] else b
            zero = x is None or y is None or (op == "/" and y == 0)
            return f"{a}{space}{op}{space}{b}", None if zero else ways[op](x, y), rank[op], True

        def negated(child):
            a, x, i, binary = child
            return f"-({a})" if i < 3 else f"-{a}", None if x is None else -x, 3, binary

        return st.builds(
            joined, children, st.sampled_from("+-*/"), children, st.sampled_from(["", " "]), st.booleans()
        ) | st.builds(negated, children)

    leaf = st.integers(0, 99).map(lambda n: (str(n), Fraction(n), 3, False))
    return st.recursive(leaf, combine, max_leaves=6).map(lambda t: (t[0], t[1], t[3]))


@settings(max_examples=300)
@given(expressions())
def test_values_are_pythons(case):
    expression, value, binary = case
    assume(len(expression) <= 100 and expression.count("(") + expression.count("-") <= MAX_DEPTH)
    assert evaluate(expression) == value
    written = value is not None and value.denominator == 1 and binary
    assert calculator(f"{expression}=") == (str(value) if written else None)


@settings(max_examples=300)
@given(st.text("0123456789+-*/() =.a", max_size=300))
def test_no_text_makes_it_fail(s):
    answer = calculator(s + "=")
    assert answer is None or answer.strip().lstrip("-").isdigit()
    evaluate(s)
