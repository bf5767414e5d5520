"""The drawn charts: positions of marks, and texts."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reftune.results.metrics import Metric, Unit
from reftune.results.page.charts import Chart, Number, Series
from reftune.results.page.drawing import draw, nice_ticks, shown


def line(y: list[Number], *, label: str = "ReFT", x: list[float] | None = None) -> Series:
    steps = [float(step) for step in range(len(y))] if x is None else x
    return Series(label=label, colour="--method-2", x=steps, y=y)


def chart(*series: Series, kind: Any = "line", **options: Any) -> Chart:
    return Chart(metric=Metric("reward/mean", "Reward", "", **options), series=series, kind=kind)


def elements(drawn: str, name: str, kind: str = "") -> list[ElementTree.Element]:
    """The elements of a drawing, which must be well-formed XML."""
    found = ElementTree.fromstring(drawn).iter(f"{{http://www.w3.org/2000/svg}}{name}")
    return [element for element in found if kind in (element.get("class") or "")]


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", element.attrib["d"])
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 0.73, 4, [0, 0.2, 0.4, 0.6]),  # .73/4 = .18, the next of 1, 2, 2.5, 5 is .2
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (-1, 0.4, 4, [-1, -0.5, 0]),  # 1.4/4 = .35 → .5
        (0, 3e-7, 4, [0, 1e-7, 2e-7, 3e-7]),
        (5, 5, 4, [5]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, count: int, ticks: list[float]) -> None:
    assert nice_ticks(low, high, count) == ticks


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.624, "percent", "62.4%"),
        (1234.5, "number", "1,234"),
        (-0.0316, "number", "−0.0316"),
        (0.12345, "number", "0.123"),
        (0.0, "number", "0"),
        (2e-7, "number", "2·10⁻⁷"),
        (-1.52e-10, "number", "−1.5·10⁻¹⁰"),
        (0.25, "seconds", "0.25 s"),
        (0.0002, "seconds", "<0.001 s"),
        (None, "number", "–"),
    ],
)
def test_values_read_as_a_person_writes_them(value: Number, unit: Unit, text: str) -> None:
    assert shown(value, unit) == text


def test_the_highest_tick_names_the_unit() -> None:
    for unit, text in (("percent", "100%"), ("seconds", "1 s"), ("number", "1")):
        drawn = draw(chart(line([0.0, 1.0]), unit=unit), 320, 185).svg
        texts = [element.text for element in elements(drawn, "text")]
        assert text in texts and not any(" %" in (found or "") for found in texts)


def test_a_gap_lifts_the_pen() -> None:
    (path,) = elements(draw(chart(line([1, None, 3, 2])), 320, 185).svg, "path", "line")
    assert path.attrib["d"].count("M") == 2
    (x0, y0), (x2, y2), (x3, y3) = points(path)
    # steps 0, 2 and 3; of the values 1, 3 and 2 the last lies halfway
    assert x2 - x0 == pytest.approx(2 * (x3 - x2), abs=0.15)
    assert y3 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_a_logarithmic_axis_gives_each_factor_the_same_room() -> None:
    drawn = draw(chart(line([0.1, 0.2, 0.3], x=[1, 10, 100]), axis="samples k"), 320, 185).svg
    (path,) = elements(drawn, "path", "line")
    (first, _), (second, _), (third, _) = points(path)
    assert second - first == pytest.approx(third - second, abs=0.15)
    assert "100 samples k" in [text.text for text in elements(drawn, "text")]


def test_layers_stand_on_each_other() -> None:
    areas = chart(line([1, 1]), line([2, 3], label="other"), kind="area")
    low, high = elements(draw(areas, 320, 185).svg, "path", "layer")
    # the upper edge of the first layer is the lower edge of the second, which is given backwards
    assert points(low)[:2] == points(high)[:1:-1]


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_names_of_lines_that_end_together_stand_apart_within_the_frame(level: float) -> None:
    lines = [line([0, level, level], label=f"method {index}") for index in range(6)]
    names = elements(
        draw(chart(*lines, line([0, 0, 1], label="top")), 900, 400, is_hero=True).svg,
        "text",
        "name",
    )
    heights = sorted(float(name.attrib["y"]) for name in names)
    assert len(heights) == 7
    assert all(b - a >= 14.9 for a, b in pairwise(heights))
    assert heights[-1] <= 376


def test_a_lone_spike_leaves_the_frame_and_many_do_not() -> None:
    def highest(y: list[Number]) -> float:
        texts = elements(draw(chart(line(y)), 320, 185).svg, "text")
        return max(float(text.text or 0) for text in texts if text.get("x") == "0")

    assert highest([1.0] * 99 + [100.0]) <= 2
    assert highest([1.0] * 90 + [100.0] * 10) >= 100


def test_many_points_are_drawn_pale_with_their_running_mean() -> None:
    noisy: list[Number] = [float(step % 2) for step in range(200)]
    raw, smooth = (
        points(elements(draw(chart(line(noisy)), 320, 185).svg, "path", kind)[0])[50:150]
        for kind in ("raw", "line")
    )
    spread = [max(y for _, y in drawn) - min(y for _, y in drawn) for drawn in (raw, smooth)]
    assert spread[1] < spread[0] / 10
    exact = draw(chart(line(noisy), exact=True), 320, 185).svg
    assert not elements(exact, "path", "raw")


def test_a_running_mean_keeps_gaps_and_is_not_drawn_down_by_them() -> None:
    gappy: list[Number] = [None if step % 7 == 3 else 5.0 for step in range(100)]
    (path,) = elements(draw(chart(line(gappy)), 320, 185).svg, "path", "line")
    assert len({y for _, y in points(path)}) == 1
    assert path.attrib["d"].count("M") == 1 + 14  # steps 3, 10, …, 94


def test_a_label_cannot_leave_its_text() -> None:
    hostile = "</text><script>alert(1)</script>\"'&"
    drawing = draw(chart(line([1, 2], label=hostile), line([2, 1])), 900, 400, is_hero=True)
    assert "<script" not in drawing.svg
    assert hostile in [text.text for text in elements(drawing.svg, "text", "name")]


numbers = st.none() | st.floats(-1e30, 1e30, allow_nan=False)


@example(lines=[[5e-324]], kind="line", floor=None, is_hero=False)
@example(lines=[[0.0, 5e-324]], kind="area", floor=None, is_hero=True)
@given(
    lines=st.lists(st.lists(numbers, min_size=1, max_size=60), min_size=1, max_size=4),
    kind=st.sampled_from(["line", "area"]),
    floor=st.sampled_from([None, -1.0]),
    is_hero=st.booleans(),
)
def test_any_numbers_make_a_drawing_in_which_no_coordinate_is_missing(
    lines: list[list[Number]], kind: str, floor: float | None, is_hero: bool
) -> None:
    if kind == "area":  # layers share their steps and are no less than 0
        size = min(map(len, lines))
        lines = [[None if y is None else abs(y) for y in found[:size]] for found in lines]
    series = [line(found, label=f"method {index}") for index, found in enumerate(lines)]
    drawn = draw(chart(*series, kind=kind, floor=floor), 900, 400, is_hero=is_hero).svg
    assert elements(drawn, "line")
    assert not re.search(r"\b(nan|inf)\b", drawn)


def test_nothing_to_draw_is_an_empty_frame() -> None:
    assert elements(draw(chart(line([None, None])), 320, 185).svg, "line", "base")
