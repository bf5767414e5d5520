"""Compares expressions, equations, intervals, tuples and matrices with math-verify.

A comparison might never end, so it runs in a worker process with a limit on CPU time. Verdicts thus
do not depend on how busy the machine is. The exception is a comparison that gets so little CPU time
that it reaches the limit on wall time, `WALL_S`, before the limit on CPU time. Workers start when
they are first needed, and then keep running. Each worker serves one thread at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import queue
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reftune.errors import ReftuneError
from reftune.grading.plain_text import LOWERED, RAISED, upright
from reftune.grading.words import UNIT_NAMES

CHILD = Path(__file__).with_name("_math_child.py")
TIMEOUT_S = 5.0
"""Seconds of CPU time allowed for one comparison."""
WALL_S = 60.0
"""Seconds after which a comparison ends even if it got little CPU time."""
NUM_WORKERS = min(4, os.cpu_count() or 1)
"""Maximum number of worker processes. Each uses about 100 MB of memory."""
START_S = 120.0
"""Seconds allowed for the start of a worker, including the import of math-verify."""
OUT_OF_TIME = (-signal.SIGPROF, -signal.SIGALRM)
"""Exit statuses of a worker that ran out of CPU time or wall time."""
MAX_EXPRESSION_CHARS = 1_000

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt lim max min gcd lcm"
    " mod inf infty infinity det deg cdot times".split()
)
_SHORT_WORDS = frozenset(
    "am an as at be by do go he if in is it me my no of on so to up us we".split()
)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_TEXT = re.compile(r"\\(?:text|mathrm|operatorname|textbf|mbox) ?\{[^{}]*\}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end) ?\{[^{}]*\}(?:\{[^{}]*\})?")
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PLAIN = re.compile(r"[\w\s+\-*/^=<>()\[\]{},;.|!'\\&]+")
_STRUCTURE = re.compile(
    r"\\[a-zA-Z{]|[\w})\]] ?[\^=<>|]|\|[\w\\]|[(\[{].*[,;].*[)\]}]"
    r"|\d ?[a-z]\b|[-+*/] ?[a-z]\b|\b[a-z] ?[-+*/(]",
    re.DOTALL,
)
_NOT_MATH = re.compile(
    r"^[<>≤≥≠=]|\b[a-z]\.[a-z]\b|^(?:[A-Z][₀-₉]+[a-z]|\d[spdf][⁰¹⁴-⁹]+)$", re.IGNORECASE
)
"""Matches abbreviations such as "a.m.", bounds without a variable, such as "< 5", and the names of
symmetries (C₂v) and orbitals (3d⁵)."""
_NAMES = "leq geq neq infty pi pm cup cap in times cdot sqrt".split()
_SIGNS = {sign: rf"\{name} " for sign, name in zip("≤≥≠∞π±∪∩∈×·√", _NAMES, strict=True)}
_SIGNS |= {"°": r"^\circ ", "−": "-"}
_ROOT = re.compile(r"√ ?(?:(\d+(?:\.\d+)?)|\(([^()]*)\))")
"""Matches a root sign and the number or bracketed expression after it, as in √13 and √(x + 1)."""
_ASSIGNMENT = re.compile(r"\s*([a-zA-Z])\s*=([^=<>]+)")
_UNIT = re.compile(
    r"(?:\\[,; ]|\s)*\\(?:text(?:rm|it)?|math(?:rm|it)|mbox) ?\{\s*"
    rf"(?:(?:square|cubic|sq\.?|cu\.?)\s)?(?:{UNIT_NAMES}|miles?|units?"
    r"|[kcdm]?m|k?g|m?[lL])\s*\}(?:\^\{?[23]\}?)?\.?$"
)
"""Matches a unit at the end of an expression, such as "\\text{ cm}^2"."""
_NAMED = re.compile(
    rf"({_TEXT.pattern})|(?<![a-zA-Z\\])"
    r"(arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec(?!\s*$)|csc|log(?!\d)|ln|exp|pi)(?![a-zA-Z])"
)
"""Matches the name of a function, or of π, that is written without a backslash. Also matches text
as a whole, in which such names stay unchanged; then group 1 is set."""
_OTHER = re.compile(r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])")
_ASIDE = re.compile(r"\s*(?:,?\s+(?:because|since|where|when|which|so)\b|[.;] +[A-Z]|\n)")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of one comparison."""

    outcome: Literal["equal", "different", "unread", "timeout", "error"]
    """`unread` means that the answer is not a single expression."""
    read: str = ""
    """The answer in a spelling that equal expressions usually share."""
    reason: str = ""


def looks_like_math(text: str) -> bool:
    """Whether the text is an expression, such as an equation, an interval or LaTeX, and not just a
    number. Text with words does not count, unless the expression is between math delimiters."""
    bare, is_price = expression_in(text), text.count("$") == 1
    if is_price or _words_in(bare) or _NOT_MATH.search(text.strip()):
        return False
    is_plain = len(bare) <= MAX_EXPRESSION_CHARS and _PLAIN.fullmatch(bare) is not None
    return is_plain and _STRUCTURE.search(_TEXT.sub("", bare)) is not None


def expression_in(text: str) -> str:
    """The expression in `text`. If `text` has exactly one pair of math delimiters, the expression
    is the text between them. Otherwise, it is the text before the first aside, such as "because …".
    Symbols such as π become LaTeX commands, and final punctuation is removed."""
    text = text.strip()[: 2 * MAX_EXPRESSION_CHARS]
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = RAISED.sub(lambda m: "^" + _braced(upright(m[0])), text)
    text = LOWERED.sub(lambda m: "_" + _braced(upright(m[0])), text)
    text = "".join(_SIGNS.get(char, char) for char in text)
    parts: list[str] = [next(filter(None, each.groups())) for each in _DELIMITED.finditer(text)]
    if len(parts) == 1:
        return parts[0].strip().rstrip(".,;").strip()
    line = _ASIDE.split(text, maxsplit=1)[0] if "\\begin" not in text else text
    return line.strip().strip("$").rstrip(".,;:").removeprefix("\\displaystyle").strip()


def same_expression(gold: str, answer: str) -> Comparison:
    """The result of comparing an answer with the gold expression. Raises: ReftuneError if
    math-verify is needed but not installed."""
    expected, given = expression_in(gold), expression_in(answer)
    if not _UNIT.search(expected):
        given = _UNIT.sub("", given)
    expected, given = _in_order(expected, given), _in_order(given, expected)
    expected, given = (_NAMED.sub(_with_backslash, each) for each in (expected, given))
    if not given or len(given) > MAX_EXPRESSION_CHARS or _words_in(given):
        return Comparison("unread")
    if _OTHER.search(_TEXT.sub("", given)) and not _OTHER.search(_TEXT.sub(" ", expected)):
        return Comparison("unread", reason="more than one answer")
    if _spelling(expected) == _spelling(given):
        return Comparison("equal", _spelling(given))
    brackets = {_brackets(expected), _brackets(given)}
    if len(brackets) > 1 and "" not in brackets:
        return Comparison("different", _spelling(given))
    return _verified(expected, given)


def _braced(digits: str) -> str:
    return digits if len(digits) == 1 else f"{{{digits}}}"


def _with_backslash(match: re.Match[str]) -> str:
    return match[1] or rf"\{match[2]} "


def _in_order(expression: str, other: str) -> str:
    """Turn assignments to several variables into a tuple of the values, sorted by variable: "y = 2,
    x = 3" becomes "(3, 2)". This is done only if the other side of the comparison, `other`, assigns
    to the same variables, or if it is a tuple and the variables are consecutive letters. Otherwise,
    the expression stays unchanged."""
    values, others = _assigned(expression), _assigned(other)
    names = sorted(values)
    is_same = names == sorted(others)
    follow = all(ord(b) == ord(a) + 1 for a, b in itertools.pairwise(names))
    if len(names) < 2 or not (is_same or (follow and _brackets(other) == "point")):
        return expression
    return f"({', '.join(values[name] for name in names)})"


def _assigned(expression: str) -> dict[str, str]:
    """Variable → value in a list of assignments to different variables; empty for other text."""
    clauses = re.split(r",|;|\band\b", expression)
    found = [_ASSIGNMENT.fullmatch(clause) for clause in clauses]
    values = {match[1]: match[2].strip() for match in found if match is not None}
    return values if len(values) == len(clauses) else {}


def is_installed() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def _verified(gold: str, answer: str) -> Comparison:
    if not is_installed():
        raise ReftuneError(
            "latex answers need math-verify: pip install 'reftune[math]' (or answer_kind: text)"
        )
    known = _KNOWN.get((gold, answer))
    if known is not None:
        return known
    worker = _IDLE.get()
    try:
        reply = worker.ask(json.dumps({"gold": gold, "answer": answer}).encode())
    finally:
        _IDLE.put(worker)
    if reply is None:
        return Comparison("timeout", reason=f"comparing took more than {TIMEOUT_S:g} s")
    result = json.loads(reply or b'{"error": "the worker died twice"}')
    if "error" in result:
        return Comparison("error", reason=str(result["error"]))
    if result["read"] is None:
        comparison = Comparison("unread")
    else:
        comparison = Comparison("equal" if result["equal"] else "different", str(result["read"]))
    if len(_KNOWN) >= MAX_KNOWN:
        _KNOWN.clear()
    _KNOWN[gold, answer] = comparison
    return comparison


def _words_in(expression: str) -> bool:
    """Whether an expression contains a word. A word is either a common two-letter word, such as
    "is", or a sequence of three or more letters that is neither a function name nor part of a LaTeX
    command. The text inside a command such as "\\text{…}" is ignored."""
    bare = _COMMAND.sub(" ", _TEXT.sub(" ", _ENVIRONMENT.sub(" ", expression)))
    words = [word.lower() for word in re.findall(r"[^\W\d_]{2,}", bare)]
    return any(word in _SHORT_WORDS or (len(word) > 2 and word not in FUNCTIONS) for word in words)


def _spelling(expression: str) -> str:
    text = re.sub(r"\\(?:left|right|,|!|;|:|displaystyle|quad)(?![a-zA-Z])|\s+|~", "", expression)
    return re.sub(r"\\[dt]frac", r"\\frac", text)


def same_spelling(first: str, second: str) -> bool:
    """Whether two expressions have the same spelling, apart from spaces, case, "$" and final
    punctuation."""
    first, second = (_spelling(text.strip(' "$').rstrip(".,;:")) for text in (first, second))
    return first.casefold() == second.casefold()


def _brackets(expression: str) -> str:
    """`set` for several parts in braces, `point` (a tuple or interval) for several parts in round
    or square brackets; empty for any other expression."""
    text = _spelling(expression).replace("\\{", "{").replace("\\}", "}")
    if not re.search(r"[,;]", text):
        return ""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        return "point"
    return "set" if text[:1] == "{" and text[-1:] == "}" else ""


# --- the worker -----------------------------------------------------------------------------------


class _Worker:
    """A process that compares expressions, one request at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> bytes | None:
        """The reply to `request`; empty if the process died twice, None if time ran out."""
        for _ in range(2):  # twice, because the request may not be why the process died
            if self._process is None:
                self._start()
            reply = self._exchange(request)
            if reply:
                return reply
            self.close()
            if reply is None:
                return None
        return b""

    def _start(self) -> None:
        """Start a process and wait until it is ready. If this takes too long, kill the process."""
        self._channel, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), *map(str, (theirs.fileno(), TIMEOUT_S, WALL_S))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        with contextlib.suppress(OSError, EOFError):
            if self._channel.poll(START_S):
                self._channel.recv_bytes()
                return
        self.close()  # a late "ready" might be taken for the reply to a request

    def _exchange(self, request: bytes) -> bytes | None:
        """The reply to `request`; empty if no process is alive, None if time ran out."""
        if self._process is None:
            return b""
        try:
            self._channel.send_bytes(request)
            return self._channel.recv_bytes() if self._channel.poll(WALL_S) else None
        except (OSError, EOFError):
            return None if self._process.wait() in OUT_OF_TIME else b""

    def close(self) -> None:
        if self._process is not None:
            self._channel.close()
            self._process.kill()
            self._process.wait()
        self._process = None


_IDLE: queue.LifoQueue[_Worker] = queue.LifoQueue()


def _forget() -> None:
    """Set up new workers, because a forked process must not use its parent's workers."""
    global _IDLE
    _IDLE = queue.LifoQueue()
    for _ in range(NUM_WORKERS):
        _IDLE.put(_Worker())


def _end() -> None:
    while not _IDLE.empty():
        _IDLE.get().close()


_KNOWN: dict[tuple[str, str], Comparison] = {}
MAX_KNOWN = 100_000
"""Maximum number of comparisons kept for reuse. Samples of a problem often repeat an answer."""
_forget()
atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
