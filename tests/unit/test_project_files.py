"""The project's files agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reftune.recipe import load_recipe
from reftune.runs.models import check_stage_graph
from reftune.terminal.live import SHOWN, TOKEN_COUNTS
from reftune.types import Verdict

ROOT = Path(__file__).parents[2]
METRIC = re.compile(
    r'"((?:progress|loss|grad|optim|compute|time|reward|reward_model|response|kl|policy|value|groups|dev)/[a-z_]+)"'
)


def requirements() -> dict[str, list[Requirement]]:
    """Extra (or `core`) → its requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def pins() -> dict[str, str]:
    """Package → the version that the tests run with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("group", ["core", "dev", "smollm2", "reasoning-gym"])
def test_the_pinned_versions_are_within_the_ranges(group: str):
    pinned = pins()
    for requirement in requirements()[group]:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_torch_is_pinned_first():
    assert next(iter(pins())) == "torch"


def test_every_dependency_says_what_it_is_for():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in requirements()["core"]:
        assert re.search(rf'^ +"{requirement.name}[>=].*",  # .+', text, re.MULTILINE), requirement


def test_every_extra_for_users_is_in_the_docs():
    page = (ROOT / "docs" / "design.md").read_text()
    for extra in requirements().keys() - {"core", "bench", "dev", "docs", "fuzz"}:
        assert f"| `{extra}` |" in page, extra


def test_every_metric_that_is_logged_or_shown_is_defined_in_the_docs():
    page = (ROOT / "docs" / "metrics.md").read_text()
    defined = set(re.findall(r"`([a-z_]+/[a-z_]+)`", page))
    sources = (ROOT / "src" / "reftune").rglob("*.py")
    logged = {name for path in sources for name in METRIC.findall(path.read_text())}
    assert logged - defined == set()
    assert {name for name, _, _ in SHOWN} | set(TOKEN_COUNTS) <= logged | defined
    assert all(verdict.value in page for verdict in Verdict)


def test_every_parity_check_is_a_test_that_names_it():
    rows = re.findall(
        r"^\| E(\d+)(?:–E(\d+))? \|.*\| (.+) \|$",
        (ROOT / "docs" / "experiments" / "parity.md").read_text(),
        re.MULTILINE,
    )
    listed = {
        n: re.findall(r"`(.+?)`", files)
        for a, b, files in rows
        for n in range(int(a), int(b or a) + 1)
    }
    assert list(listed) == list(range(1, 26))
    for number, files in listed.items():
        tests = [(ROOT / "tests" / file).read_text() for file in files]
        assert any(re.search(rf"def test_e{number}_|# .*\bE{number}\b", text) for text in tests), (
            f"E{number}"
        )


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("demo", "instruct", "smollm2", "paper")
        for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))
        if path.stem != "published"
    ],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_the_stages_of_a_shipped_recipe_start_from_earlier_ones(path: Path):
    check_stage_graph(load_recipe(path))
