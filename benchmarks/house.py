"""Measures the structure of the package: its size, the imports between its rooms (the files and
folders at its top), and the files that one run enters.

    python benchmarks/house.py            # or: make house

Lines are physical lines of Python. A run enters a file if it calls one of the file's functions.
Importing a file, which runs its class bodies, does not count. Calls across files are counted as
pairs of functions: the two are in different files of the package, and one of them calls the other
in the RL step of the smallest run (`RECIPE`). A pair counts once, even if there are many calls.
"""

from __future__ import annotations

import ast
import inspect
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import reftune

SOURCE = Path(reftune.__file__).parent
ROOMS = """
types errors seeds text processes recipe storage grading datasets model engines algorithms stages
results runs advice terminal api
""".split()
"""The rooms: the files and folders at the top of the package, in the order of docs/design.md. A
room may import only rooms before it."""
READ = """
types recipe datasets/jsonl grading model/policy model/batch model/logprobs model/encoder
model/value_head engines/kv algorithms stages runs/run runs/models storage/checkpoint terminal/cli
""".split()
"""The files and folders to read in order to understand a ReFT run."""
NOT_READ = """
grading/sandbox/_child grading/sandbox/subprocess grading/perturbed grading/rewards/function
algorithms/grpo algorithms/rloo stages/probes stages/reward_model
""".split()
"""Parts of the folders in `READ` that a ReFT run does not need."""


def python_files(folder: Path = SOURCE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def names_at_top() -> list[str]:
    """Rooms and modules at the top level of the package."""
    skipped = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    return sorted(path.stem for path in SOURCE.iterdir() if path.name not in skipped)


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of reftune that code imports at run time, including imports inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reftune"):
            base = (node.module or "").removeprefix("reftune").lstrip(".")
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("reftune."):
                    yield alias.name.removeprefix("reftune.")
        yield from imported(node)


def import_graph() -> dict[str, set[str]]:
    """Module → modules it imports; importing a name from a module counts as importing the
    module."""
    modules = {module_of(path): path for path in python_files()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {name if name in modules else name.rpartition(".")[0] for name in imported(tree)}
        graph[module] = {name for name in found if name in modules and name not in ("", module)}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(group)

    for module in graph:
        if module not in index:
            visit(module)
    return found


def against_the_order(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs (importer, imported) of modules that break the order of the rooms."""
    place = {room: number for number, room in enumerate(ROOMS)}
    return [
        (module, other)
        for module, others in graph.items()
        for other in others
        if module not in ("", "__main__")
        and place[other.partition(".")[0]] > place[module.partition(".")[0]]
    ]


def to_read() -> list[Path]:
    """The files to read in order to understand a ReFT run."""

    def within(path: Path, names: list[str]) -> bool:
        own = path.relative_to(SOURCE).with_suffix("").as_posix()
        return any(own == name or own.startswith(f"{name}/") for name in names)

    return [path for path in python_files() if within(path, READ) and not within(path, NOT_READ)]


RECIPE: dict[str, Any] = {
    "name": "smallest",
    "model": {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "context": 80}},
    "dataset": {"kind": "word_problems", "train": 24, "dev": 8, "test": 8, "operations": [0, 1]},
    "format": {"kind": "program", "style": "compact"},
    "lengths": {"max_new": 24},
    "trackers": [],
    "stages": {
        "sft": {
            "kind": "sft",
            "epochs": 1,
            "batch_size": 8,
            "snapshots": {"warmup": 1},
            "optimizer": {"learning_rate": 1e-3},
        },
        "reft": {
            "kind": "rl",
            "steps": 1,
            "prompts": 4,
            "samples": 2,
            "optimizer": {"learning_rate": 1e-3},
        },
    },
}
"""The smallest run: a warm-up and one RL step."""


class Watch:
    """A profile function that records the files that a run enters. In RL steps, it also records the
    pairs (caller, called) of functions from different files."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.pairs: set[tuple[str, str]] = set()
        self.in_step = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or not self._is_ours(frame):
            return
        if frame.f_code.co_qualname == "Trainer.step":
            self.in_step += 1 if event == "call" else -1
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # no module or class body
        if event == "return" or not is_function:
            return
        self.files.add(frame.f_code.co_filename)
        caller = frame.f_back
        while caller is not None and not self._is_ours(caller):
            caller = caller.f_back
        if caller is None or not self.in_step:
            return
        if caller.f_code.co_filename != frame.f_code.co_filename:
            self.pairs.add((self._name(caller), self._name(frame)))

    @staticmethod
    def _is_ours(frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(f"{SOURCE}/")

    @staticmethod
    def _name(frame: FrameType) -> str:
        return f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"


def watched_run() -> Watch:
    """What `Watch` records of the smallest run."""
    from reftune.recipe import parse_recipe
    from reftune.runs.run import run_recipe
    from reftune.stages.stage import Progress

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe({**RECIPE, "run_dir": f"{folder}/run"})
        sys.setprofile(watch)
        try:
            run_recipe(recipe, progress=Progress())
        finally:
            sys.setprofile(None)
    return watch


def main() -> None:
    graph, watch = import_graph(), watched_run()
    figures = {
        "names at the top level": len(names_at_top()),
        "import cycles": len(cycles(graph)),
        "imports against the order": len(against_the_order(graph)),
        "package, lines": lines(python_files()),
        "to read for a ReFT run, lines": lines(to_read()),
        "calls across files in one RL step": len(watch.pairs),
        "files entered by the smallest run": len(watch.files),
    }
    for name, figure in figures.items():
        print(f"{name:<36}{figure:>8,}")


if __name__ == "__main__":
    main()
