"""Compares expressions for `mathematics.py`. This file runs as a script and imports nothing from
reftune.

The script's only argument is the file descriptor of a connection to the parent process. Each
request is a JSON object with the keys `gold` and `answer`. The reply is a JSON object with two
keys: `equal` is a boolean, and `read` is the parsed answer, or null if the answer is not an
expression. If the comparison fails, the reply has only the key `error`. The parent kills this
process if a comparison takes too long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 4 << 30
MAX_S = 60
"""If a comparison takes this many seconds, an alarm ends this process. This matters only if the
parent has died, because then it cannot kill this process."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    channel = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        while True:
            request = json.loads(channel.recv_bytes())
            signal.alarm(MAX_S)
            channel.send_bytes(json.dumps(reply(request)).encode())
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
