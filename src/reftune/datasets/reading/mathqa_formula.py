"""Turns MathQA's `linear_formula` into the steps of a Python program.

With n0 = 5 and n1 = 640, `divide(n0,const_100)|multiply(n1,#0)|` becomes `step_1 = 5 / 100` and
`step_2 = 640 * step_1`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

OPERATIONS: Mapping[str, str] = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "power": "{} ** {}",
    "negate": "-{}",
    "negate_prob": "1 - {}",
    "inverse": "1 / {}",
    "sqrt": "math.sqrt({})",
    "log": "math.log({})",
    "floor": "math.floor({})",
    "max": "max({}, {})",
    "min": "min({}, {})",
    "reminder": "{} % {}",
    "gcd": "math.gcd(int({}), int({}))",
    "lcm": "math.lcm(int({}), int({}))",
    "factorial": "math.factorial(int({}))",
    "choose": "math.comb(int({}), int({}))",
    "permutation": "math.perm(int({}), int({}))",
    "speed": "{} / {}",
    "stream_speed": "({} - {}) / 2",
    "p_after_gain": "{1} * (1 + {0} / 100)",
    "original_price_before_gain": "{1} / (1 + {0} / 100)",
    "original_price_before_loss": "{1} / (1 - {0} / 100)",
    "square_perimeter": "4 * {}",
    "square_area": "{} ** 2",
    "square_edge_by_area": "math.sqrt({})",
    "square_edge_by_perimeter": "{} / 4",
    "rectangle_perimeter": "2 * ({} + {})",
    "rectangle_area": "{} * {}",
    "rhombus_perimeter": "4 * {}",
    "rhombus_area": "{} * {} / 2",
    "quadrilateral_area": "{} * ({} + {}) / 2",
    "triangle_perimeter": "{} + {} + {}",
    "triangle_area": "{} * {} / 2",
    "triangle_area_three_edges": (
        "math.sqrt(({0} + {1} + {2}) * ({1} + {2} - {0}) * ({0} + {2} - {1}) * ({0} + {1} -"
        " {2})) / 4"
    ),
    "circumface": "2 * math.pi * {}",
    "circle_area": "math.pi * {} ** 2",
    "surface_cube": "6 * {} ** 2",
    "surface_rectangular_prism": "2 * ({0} * {1} + {1} * {2} + {0} * {2})",
    "surface_cylinder": "2 * math.pi * {0} * ({0} + {1})",
    "surface_sphere": "4 * math.pi * {} ** 2",
    "volume_cube": "{} ** 3",
    "cube_edge_by_volume": "{} ** (1 / 3)",
    "volume_rectangular_prism": "{} * {} * {}",
    "volume_cylinder": "math.pi * {} ** 2 * {}",
    "volume_cone": "math.pi * {} ** 2 * {} / 3",
    "volume_sphere": "4 / 3 * math.pi * {} ** 3",
}
"""Operation → Python expression, for every operation in MathQA's dev and test files. A formula with
any other operation gets no program."""

EXACT_CONSTANTS: Mapping[str, str] = {"const_pi": "math.pi", "const_0_2778": "(5 / 18)"}
"""Exact values of constants that MathQA rounds. MathQA converts km/h to m/s with 0.2778 instead of
5/18. With this rounded value, results would not match the options."""

NUMBER = re.compile(r"[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+")
"""Matches the numbers that MathQA calls n0, n1, … A comma between digits belongs to the number even
if it does not group thousands."""
STEP = re.compile(r"\s*(?P<operation>\w+)\((?P<operands>[^()]*)\)\s*")


def formula_steps(linear_formula: str, problem: str) -> list[tuple[str, str]] | None:
    """The formula's last step and all steps that it depends on, in order, each as (name,
    expression). The numbers come from the question `problem`. Returns None if the formula is
    unreadable."""
    numbers = [number.replace(",", "") for number in NUMBER.findall(problem)]
    parsed = [STEP.fullmatch(text) for text in linear_formula.strip().strip("|").split("|")]
    templates = [OPERATIONS.get(match["operation"]) if match else None for match in parsed]
    operands = [
        [text.strip() for text in match["operands"].split(",")] if match else [] for match in parsed
    ]
    names = _names_of_needed(operands)
    steps: list[tuple[str, str]] = []
    for position, name in names.items():
        template = templates[position]
        values = [_value(operand, numbers, names, position) for operand in operands[position]]
        places = re.findall(r"\{\d?\}", template or "")
        num_places = len(places) if "{}" in places else len(set(places))
        if template is None or None in values or num_places != len(values):
            return None
        steps.append((name, re.sub(r"\bint\(([0-9]+)\)", r"\1", template.format(*values))))
    return steps


def _names_of_needed(operands: Sequence[Sequence[str]]) -> dict[int, str]:
    """The names of the needed steps, in the order of the formula. The keys are the steps' positions
    in the formula. The last step is needed, and so is every step that it depends on."""
    needed = {len(operands) - 1}
    for position in reversed(range(len(operands))):
        if position in needed:
            texts = operands[position]
            needed |= {int(text[1:]) for text in texts if _refers_back(text, position)}
    return {position: f"step_{number}" for number, position in enumerate(sorted(needed), start=1)}


def _refers_back(operand: str, position: int) -> bool:
    return operand[:1] == "#" and operand[1:].isdecimal() and int(operand[1:]) < position


def _value(
    operand: str, numbers: Sequence[str], names: Mapping[int, str], position: int
) -> str | None:
    if _refers_back(operand, position):
        return names[int(operand[1:])]
    if operand[:1] == "n" and operand[1:].isdecimal():
        return _literal(numbers[int(operand[1:])]) if int(operand[1:]) < len(numbers) else None
    if operand in EXACT_CONSTANTS:
        return EXACT_CONSTANTS[operand]
    constant = operand.removeprefix("const_").replace("_", ".")
    is_constant = operand.startswith("const_") and NUMBER.fullmatch(constant)
    return _literal(constant) if is_constant else None


def _literal(number: str) -> str:
    """A number as a Python literal: `007` → `7`, `.5` → `0.5`, `100.0` → `100`."""
    whole, _, fraction = number.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole
