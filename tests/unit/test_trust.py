"""The table of `make trust` counts the suites' results."""

from __future__ import annotations

from pathlib import Path

import pytest

import trust

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties>
<property name="tried" value="200"/><property name="lost" value="0"/>
</properties></testcase>
<testcase name="b"><properties>
<property name="tried" value="50"/><property name="lost" value="3"/>
</properties><failure/></testcase>
<testcase name="c"/>
<testcase name="d"><properties><property name="lost" value="0"/></properties><failure/></testcase>
<testcase name="e"><error/></testcase>
<testcase name="f"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    return path


def test_a_test_is_one_case_unless_it_states_a_number(report: Path) -> None:
    # tried 200 + 50 + three tests of one case each; lost 3 + 1 + 1; the skipped test counts for
    # none
    counted = trust.count("hostile", report, seconds=2.0)
    assert (counted.tried, counted.survived, counted.lost, counted.skipped) == (253, 248, 5, 1)
    assert trust.table([counted]).splitlines()[-1] == "| hostile | 253 | 248 | 5 | 1 | 2 |"


def test_a_suite_that_breaks_loses_a_case(report: Path) -> None:
    assert trust.count("kill", report, seconds=2.0, broke=True).lost == 6


@pytest.mark.parametrize(("tried", "lost", "status"), [(5, 0, 0), (5, 1, 1), (0, 0, 1)])
def test_the_status_says_whether_anything_was_lost(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tried: int,
    lost: int,
    status: int,
) -> None:
    counted = trust.Count(
        suite="fuzz", tried=tried, survived=tried - lost, lost=lost, skipped=0, seconds=1.0
    )
    monkeypatch.setattr(trust, "run", lambda *_, **__: counted)
    assert trust.main(["fuzz"]) == status
    assert capsys.readouterr().out.startswith("| suite | tried | survived | lost |")


def test_a_suite_without_an_end_or_a_report_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "ROOT", Path("/"))  # no tests there
    assert trust.run("fuzz", short=True, limit_s=0.001).lost == 1
