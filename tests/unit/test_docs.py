"""Every code block of the documentation runs.

`python` blocks are executed, with one namespace per page. In `bash` blocks, `reftune` lines are
executed here and all others by a shell. A `yaml` block is a recipe or a part of one, and a `text`
block is output. An HTML comment above a block changes this: `<!-- instead: COMMAND -->` runs
something smaller, `<!-- skip: REASON -->` runs nothing, and `<!-- file: NAME -->` writes the block
to a file.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from reftune.recipe import merge, parse_recipe
from reftune.recipe.reading import read_yaml
from reftune.terminal.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (skip|instead|file): (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
OUTPUT = ("text", "csv")


@dataclass(frozen=True)
class Block:
    directive: str
    argument: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_says_what_it_is(page: Path):
    for block in blocks(page):
        assert block.language in ("python", "bash", "yaml", *OUTPUT), block
        assert block.directive != "file" or block.argument
    assert page.read_text().count("\n```") == 2 * len(blocks(page)), (
        "a fence that is indented or not closed"
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=named)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if block.directive == "skip":
            continue
        if block.directive == "file":
            (tmp_path / block.argument).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, named(page), "exec"), namespace)
        elif block.language == "bash":
            run(block.argument if block.directive == "instead" else block.code)
        elif block.language == "yaml":
            read_recipe(block.code)


def run(commands: str) -> None:
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["reftune"]:
            with pytest.raises(SystemExit) as left:
                main(words[1:])
            assert left.value.code == 0, line
        elif words:
            subprocess.run(line, shell=True, check=True)


def read_recipe(text: str) -> None:
    """Validate a recipe; a part is put into a whole recipe first."""
    part = yaml.safe_load(text)
    whole = (
        part
        if {"name", "model", "stages"} <= set(part)
        else merge(read_yaml(ROOT / "recipes/demo/smoke.yaml"), part)
    )
    if "model" in part and "path" in part["model"]:
        whole["model"] = part["model"]
    parse_recipe(whole)


def test_the_recipe_reference_matches_the_code():
    page = runpy.run_path(str(ROOT / "docs" / "_recipe_reference.py"))["page"]()
    assert page == (ROOT / "docs" / "recipe.md").read_text(), "run `make docs`"
    assert "`lam` | `0.95` | GAE's λ.\n" in page


def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert "Start with the tutorial" in page
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)', page), (
        "nothing is loaded from elsewhere"
    )
