"""Compares expressions for `mathematics.py`. This file runs as a script and imports nothing from
reftune.

The script's arguments are the file descriptor of a connection to the parent process, and the limits
on the CPU time and wall time of each comparison, in seconds. When the script is ready, it sends a
message. Each request is a JSON object with the keys `gold` and `answer`. The reply is a JSON object
with two keys: `equal` is a boolean, and `read` is the parsed answer, or null if the answer is not
an expression. If the comparison fails, the reply has only the key `error`. If a comparison takes
too long, SIGPROF (CPU time) or SIGALRM (wall time) ends this process.
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
WARM_UP = (("2x + 3 = 5", "x = 1"), (r"\sin^2 x", r"\int_0^1 x^2 dx"))
"""Comparing these pairs imports all modules that any comparison may need."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    channel, cpu_s, wall_s = Connection(int(sys.argv[1])), float(sys.argv[2]), float(sys.argv[3])
    warm_up()
    channel.send_bytes(b"ready")
    with contextlib.suppress(EOFError):
        while True:
            request = json.loads(channel.recv_bytes())
            _limit(cpu_s, wall_s)
            answer = json.dumps(reply(request)).encode()
            _limit(0, 0)
            channel.send_bytes(answer)


def warm_up() -> None:
    for gold, answer in WARM_UP:
        reply({"gold": gold, "answer": answer})


def _limit(cpu_s: float, wall_s: float) -> None:
    """End this process after `cpu_s` of CPU time or `wall_s` of wall time; 0 means no limit."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


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
