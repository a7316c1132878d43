"""`calculator`: exact arithmetic on an expression, by an evaluator of its own over Python's syntax tree.

Nothing is ever compiled or run: of the tree only numbers and the operators + - * / // % ** exist. Everything is a
Fraction, so 0.1 + 0.2 is 0.3. Length, depth and digits are bounded, each before it costs anything, so that no
expression takes more than a few milliseconds.
"""

from __future__ import annotations

import ast
import re
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from rl.tools.tool import Tool, ToolError

MAX_CHARS = 500
MAX_DEPTH = 50  # of parentheses, signs and powers in one another
MAX_DIGITS = 1000  # of numerator and denominator, of every value on the way
MAX_BITS = MAX_DIGITS * 3322 // 1000  # log2(10) = 3.3219...
MAX_PLACES = 30  # behind the point; longer decimals are printed as fractions
ALLOWED = re.compile(r"[0-9.eE+\-*/%() \t\n]*")
EXPONENT = re.compile(r"[eE][+-]?([0-9]+)")
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


class Calculator(Tool):
    """Stateless. An integer is printed in digits, a finite decimal as one, anything else as a fraction with its
    approximation."""

    name = "calculator"
    description = "Computes an arithmetic expression exactly: numbers, + - * / // % ** and parentheses."
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression, without an equals sign."}},
        "required": ["expression"],
    }

    async def call(self, expression: str) -> str:
        return written(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """The exact value. ToolError: not an expression of this kind, or out of bounds, or a division by zero."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression is longer than {MAX_CHARS} characters")
    source = expression.translate(SIGNS).strip()
    if not source:
        raise ToolError("the expression is empty")
    _check_letters(source)
    source = " ".join(source.split())
    depth = deepest = 0
    for letter in source:
        depth += (letter == "(") - (letter == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ToolError(f"parentheses are nested more than {MAX_DEPTH} deep")
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise ToolError(f"this is no arithmetic expression: {reason}") from error
    return _value(tree.body, source, 0)


def written(value: Fraction) -> str:
    """12, -0.125, or 1/3 (about 0.3333333333333)."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        places = max(places, power)
    if rest == 1 and places <= MAX_PLACES:
        whole, part = divmod(abs(value.numerator) * 10**places // value.denominator, 10**places)
        return f"{'-' if value < 0 else ''}{whole}.{part:0{places}}"
    about = Context(prec=13).divide(Decimal(value.numerator), Decimal(value.denominator))
    return f"{value} (about {about})"


def _check_letters(source: str) -> None:
    matched = ALLOWED.match(source)
    assert matched is not None
    if matched.end() < len(source):
        letter = source[matched.end()]
        hint = {"^": ": write ** for a power", ",": ": write 1000, not 1,000", "=": ": leave it out"}.get(letter, "")
        raise ToolError(f"{letter!r} is not allowed in an expression{hint}")
    if any(len(exponent) > 4 or int(exponent) > MAX_DIGITS for exponent in EXPONENT.findall(source)):
        raise ToolError(f"a number has more than {MAX_DIGITS} digits")


def _value(node: ast.expr, source: str, depth: int) -> Fraction:
    """`depth`: of recursion. A chain a + b + c leans to the left and is walked in a loop."""
    if depth > MAX_DEPTH:
        raise ToolError(f"the expression is nested more than {MAX_DEPTH} deep")
    steps: list[ast.BinOp] = []
    while isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Pow):
        steps.append(node)
        node = node.left
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = _bounded(Fraction(source[node.col_offset : node.end_col_offset]))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _value(node.operand, source, depth + 1)
        value = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp):
        value = _power(_value(node.left, source, depth + 1), _value(node.right, source, depth + 1))
    else:
        raise ToolError("this is no arithmetic expression: an operator is missing or wrong")
    for step in reversed(steps):
        value = _bounded(_apply(step.op, value, _value(step.right, source, depth + 1)))
    return value


def _apply(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(operator, ast.Div | ast.FloorDiv | ast.Mod) and right == 0:
        raise ToolError("division by zero")
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return Fraction(left // right)
        case ast.Mod():
            return left % right
    raise ToolError("only + - * / // % ** are known")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError(f"{written(exponent)} is no whole number: only whole powers are exact")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1  # |value| >= 2 ** bits
    if bits * abs(exponent.numerator) > MAX_BITS:
        raise ToolError(f"a number has more than {MAX_DIGITS} digits")
    if abs(base) in (0, 1):  # of any exponent
        return base if exponent % 2 else Fraction(base * base if exponent else 1)
    return _bounded(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS + 1:
        raise ToolError(f"a number has more than {MAX_DIGITS} digits")
    return value
