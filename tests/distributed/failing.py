"""A recipe component that fails in one process of several."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Literal

from components import Tossed
from reftune.errors import DataError
from reftune.types import Graded, Problem

_graded = 0


class Failing(Tossed):
    rank: int = 1
    how: Literal["raises", "bug", "killed"] = "raises"
    at: int = 2
    """The number of the process's grading call that fails."""

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Graded]:
        global _graded
        _graded += 1
        if _graded == self.at and os.environ.get("RANK") == str(self.rank):
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise (
                DataError("no grade today")
                if self.how == "raises"
                else ZeroDivisionError("no grade today")
            )
        return super().grade(problems, completions)
