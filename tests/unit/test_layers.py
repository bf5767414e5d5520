"""Imports go downwards in the listing of docs/design.md only."""

import ast
from pathlib import Path

import pytest

import reftune

ROOMS = """
types errors seeds text processes recipe storage grading datasets model engines algorithms stages
results runs advice terminal api
""".split()
"""In the order of docs/design.md: a room, a file or folder of the package, imports only from itself
and from rooms before it."""

SOURCE = Path(reftune.__file__).parent
FILES = sorted(
    path
    for path in SOURCE.rglob("*.py")
    if path not in {SOURCE / "__main__.py", SOURCE / "__init__.py"}
)


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Rooms of reftune that run-time code imports, wherever the import stands. `if TYPE_CHECKING`
    does not run."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "reftune":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module.split(".")[1]} if node.module.startswith("reftune.") else set()
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("reftune.")
            }
        found |= imports(node)
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_rooms_above_it(path: Path):
    own = room(path)
    assert own in ROOMS, f"{own} is not in the listing; give it a place here and in docs/design.md"
    above = ROOMS[: ROOMS.index(own) + 1]
    assert imports(ast.parse(path.read_text(encoding="utf-8"))) <= set(above)


def test_imports_are_found_in_functions_and_not_under_type_checking():
    code = """
from reftune.errors import DataError
from reftune import __version__
from reftune.grading import voting
if TYPE_CHECKING:
    from reftune.terminal.cli import app
def late():
    import reftune.model.policy
"""
    assert imports(ast.parse(code)) == {"errors", "grading", "model"}
