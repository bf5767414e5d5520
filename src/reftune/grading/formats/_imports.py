"""Removes unused imports from programs.

Programs are split into tokens, but neither parsed nor run, so that no program can crash this
process. A program that cannot be split into tokens is left unchanged.
"""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from collections.abc import Sequence

from reftune.grading.sandbox.result import FORBIDDEN_MODULES

_WORD = re.compile(r"\w+")
_NAME = rf"(?!(?:{'|'.join(keyword.kwlist)})\b)[^\W\d]\w*"
_DOTTED, _AS = rf"{_NAME}(?: \. {_NAME})*", rf"(?: as {_NAME})?"
_NAMES = rf"{_NAME}{_AS}(?: , {_NAME}{_AS})*"
_STATEMENT = re.compile(
    rf"(import) ({_DOTTED}{_AS}(?: , {_DOTTED}{_AS})*)"
    rf"|(from {_DOTTED} import) ({_NAMES}|\( {_NAMES}(?: ,)? \))"
)
_LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
_RUNS_TEXT = {"eval", "exec", "compile"}

_Token = tokenize.TokenInfo


def without_unused_imports(program: str) -> str:
    """`program` without its unused imports. A statement that imports only unused names becomes
    `pass`. A name counts as used if it occurs anywhere in an f-string, or if it occurs in code and
    does not follow a dot. If the program uses `eval`, `exec` or `compile`, names in any other
    string count as used too. `import *` is kept. Imports of forbidden modules are also kept, so
    that the sandbox notices them."""
    if "import" not in program:
        return program
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return program
    imports, others = _imports(tokens)
    used, lines = _used(others), program.split("\n")
    for statement in reversed(imports):
        replacement = _less_unused(statement, used)
        if replacement is not None:
            (first, begin), (last, end) = statement[0].start, statement[-1].end
            changed = lines[first - 1][:begin] + replacement + lines[last - 1][end:]
            lines[first - 1 : last] = [changed, *[""] * (last - first)]
    return "\n".join(lines)


def _imports(tokens: Sequence[_Token]) -> tuple[list[list[_Token]], list[_Token]]:
    """The import statements, and the tokens outside them. Each statement is the list of its tokens,
    without line breaks and comments."""
    imports, others = [], []
    starts, statement, depth = True, None, 0
    for token in tokens:
        if statement is not None:
            if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER) or token.string == ";":
                imports.append(statement)
                statement = None
            elif token.type not in _LAYOUT:
                statement.append(token)
        elif starts and token.string in ("import", "from"):
            statement = [token]
        else:
            others.append(token)
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type not in _LAYOUT:
            starts = token.type == tokenize.NEWLINE or (depth == 0 and token.string in (";", ":"))
    return imports, others


def _used(tokens: Sequence[_Token]) -> set[str]:
    names = {
        token.string
        for before, token in zip([None, *tokens], tokens, strict=False)
        if token.type == tokenize.NAME and (before is None or before.string != ".")
    }
    evaluates = bool(names & _RUNS_TEXT)
    for token in tokens:
        prefix = token.string.partition(token.string[-1])[0].lower() if token.string else ""
        if token.type == tokenize.STRING and (evaluates or "f" in prefix):
            names.update(_WORD.findall(token.string))
    return names


def _less_unused(statement: Sequence[_Token], used: set[str]) -> str | None:
    """The statement without its unused names. None if the statement stays unchanged, for example
    because it is not well-formed."""
    match = _STATEMENT.fullmatch(" ".join(token.string for token in statement))
    if match is None:
        return None
    head, names = (group.replace(" . ", ".") for group in match.groups() if group is not None)
    parts = names.strip(" (),").split(" , ")
    modules = parts if head == "import" else [head.removeprefix("from ")]
    kept = [part for part in parts if _bound(part) in used]
    is_forbidden = any(_WORD.findall(module)[0] in FORBIDDEN_MODULES for module in modules)
    if len(kept) == len(parts) or is_forbidden:
        return None
    return f"{head} {', '.join(kept)}" if kept else "pass"


def _bound(part: str) -> str:
    """The name that an import defines, such as `a` for `import a.b`."""
    return part.rpartition(" as ")[2] if " as " in part else part.partition(".")[0]
