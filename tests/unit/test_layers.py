"""Imports go downwards in the listing of docs/design.md only."""

import ast
from pathlib import Path

import pytest

import reftune

LISTING = """
errors zero distributed signals types seeds jsonlines recipe answers perturb voting stats batch advantages losses _sandbox_child
sandbox_subprocess sandbox encoding models logprobs cpu attention policy datasets formats rewards engines algorithms collect
choices checkpoint progress trackers watch training evaluation value_prefit train_sft train_rl self_train reward_model
report run_folder memory plan estimate sample check score export init api cli
"""
"""Top to bottom: a module imports only modules before it. A folder counts as one layer."""

LAYERS = LISTING.split()
PARTS = {"_sandbox_child": "sandbox", "sandbox_subprocess": "sandbox"}
"""Files that make one layer together and may import each other."""

SOURCE = Path(reftune.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name not in {"__main__.py"} and path != SOURCE / "__init__.py")


def layer(path: Path) -> str:
    return layer_of(path.relative_to(SOURCE).parts[0].removesuffix(".py"))


def layer_of(module: str) -> str:
    return PARTS.get(module, module)


def imports(tree: ast.AST) -> set[str]:
    """Layers of reftune that run-time code imports, wherever the import stands. `if TYPE_CHECKING` does not run."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "reftune":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module.split(".")[1]} if node.module.startswith("reftune.") else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("reftune.")}
        found |= imports(node)
    return {layer_of(module) for module in found - {"__version__"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_what_stands_above_it(path: Path):
    own = layer(path)
    assert own in LAYERS, f"{own} has no place in the listing; give it one here and in docs/design.md"
    above = LAYERS[: LAYERS.index(own) + 1]
    assert imports(ast.parse(path.read_text(encoding="utf-8"))) <= set(above)


def test_imports_are_found_in_functions_and_not_under_type_checking():
    code = """
from reftune.errors import DataError
from reftune import __version__, voting
if TYPE_CHECKING:
    from reftune.cli import app
def late():
    import reftune.policy
"""
    assert imports(ast.parse(code)) == {"errors", "voting", "policy"}
