"""Compares expressions for `mathematics.py`. This file runs as a script and imports nothing from
reftune.

Each line of standard input is a request: a JSON object with the keys `gold` and `answer`. The reply
is a JSON object on one line of standard output, with the keys `equal` and `read`; `read` is null if
the answer is not an expression. If the comparison fails, the reply has only the key `error`. The
parent kills this process if a comparison takes too long.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY = 4 << 30
MAX_S = 60
"""Seconds after which an alarm ends a comparison and this process, in case the parent has died."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    results = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    for line in sys.stdin:
        signal.alarm(MAX_S)
        results.write(json.dumps(reply(json.loads(line))) + "\n")
        results.flush()
        signal.alarm(0)


def reply(request: dict[str, str]) -> dict[str, Any]:
    try:
        return compared(request["gold"], request["answer"])
    except (Exception, RecursionError) as error:  # noqa: BLE001  a model's expression may break any parser
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def compared(gold: str, answer: str) -> dict[str, Any]:
    from math_verify import verify

    expected, read = parsed(gold), parsed(answer)
    if not expected:
        return {"error": f"math-verify cannot read the gold answer {gold[:100]}"}
    if not read:
        return {"equal": False, "read": None}
    equal = verify(expected, read, timeout_seconds=None, raise_on_error=True)
    return {"equal": bool(equal), "read": str(read[0])[:400]}


@lru_cache(maxsize=1000)
def parsed(text: str) -> list[Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    plain = NormalizationConfig(  # keeps units, because 4m is not 4
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    found: list[Any] = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig(normalization_config=plain)],
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return found if any(not isinstance(each, str) for each in found) else []


if __name__ == "__main__":
    main()
