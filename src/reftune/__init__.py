"""reftune: Reinforced Fine-Tuning (ReFT, Luong et al., ACL 2024, arXiv:2401.08967).

import reftune

summary = reftune.run("recipe.yaml", "seed=1")
graded = reftune.grade("The answer is 1,000 dollars.", 1000)
result = reftune.evaluate("runs/mine/stages/reft", [{"question": "1 + 1?", "answer": 2}])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftune.api import Evaluation as Evaluation
    from reftune.api import evaluate as evaluate
    from reftune.api import grade as grade
    from reftune.api import run as run
    from reftune.types import Graded as Graded
    from reftune.types import Problem as Problem
    from reftune.types import Verdict as Verdict

__version__ = "0.1.0"

_HOMES = {
    "evaluate": "api",
    "grade": "api",
    "run": "api",
    "Evaluation": "api",
    "Graded": "types",
    "Problem": "types",
    "Verdict": "types",
}
"""Public name → its module. A module is imported only on first use, so `import reftune` is fast."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
