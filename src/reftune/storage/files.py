"""Writes files that stay intact if the process is killed. Text files and folders are written under
a temporary name, and renamed once they are complete. JSON Lines files can be cut back to the length
that they had at a checkpoint. If there are several processes, only the main process writes. A disk
error while writing is raised as a CheckpointError, unless a function's docstring says otherwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reftune.errors import CheckpointError
from reftune.processes.world import from_main, is_main
from reftune.types import Problem


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a disk error inside the block into a CheckpointError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written: {reason}") from None
    except Exception as error:
        # the tokenizers library raises a plain Exception for a disk error
        if type(error) is not Exception or "(os error " not in str(error):
            raise
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary file, then rename this file to `path`. `?` replaces half a
    surrogate pair."""
    if not is_main():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError("it is a folder; expected a file")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8", errors="replace")
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace `folder` with a new folder, which `fill(partial)` writes at the temporary path
    `partial`. `fill` is called in every process, because it may have to gather weights from all
    processes, but it must write only in the main process. Then the old folder is given a temporary
    name, and the new folder is renamed to `folder`. If the process is killed between these two
    steps, the old folder keeps the temporary name until `restore_folder` is called. After a disk
    error, the new folder is deleted."""
    partial, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    if not is_main():
        fill(partial)
        return
    restore_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            fill(partial)
            make_readable(partial)
            for path in (*partial.rglob("*"), partial):
                sync(path)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(folder.parent)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Let everyone who may read `folder` also read the files in it, because safetensors writes
    files that only their owner may read. Raises: OSError for a disk error."""
    readable = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | readable)


def restore_folder(folder: Path) -> None:
    """Clean up if the process was killed during `replace_folder`, which sets the old folder aside.
    If `folder` is missing, move the old one back. If `folder` exists, delete the old one."""
    old = _old(folder)
    if not (is_main() and old.exists()):
        return
    with writing(folder):
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def link_files(source: Path, target: Path, *, but: str = "") -> None:
    """For every file under `source`, create a hard link at the same relative path under `target`,
    replacing any file that is already there. Files with the name given by `but` are skipped. If the
    file system does not support hard links, the files are copied."""
    if not is_main():
        return
    with writing(target):
        for path in source.rglob("*"):
            if not path.is_file() or path.name == but:
                continue
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            try:
                link.hardlink_to(path)
            except OSError:  # no hard links on this file system
                shutil.copyfile(path, link)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut. Raises:
    OSError for a disk error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonLines:
    """A file of one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line. `?` replaces half a surrogate pair, which a user's grader may return."""
        if not is_main():
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n")

    def sync(self) -> None:
        """Wait until the appended lines would survive a power cut."""
        if is_main() and self.path.exists():
            with writing(self.path):
                sync(self.path)

    def size(self) -> int:
        """Size of the file in bytes; 0 if there is no file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Cut the file after `size` bytes."""
        if is_main() and self.size() > size:
            with writing(self.path), self.path.open("r+b") as file:
                file.truncate(size)

    def keep(self, count: int) -> None:
        """Cut the file after `count` lines. An incomplete last line is dropped too."""
        self.truncate(sum(len(line) + 1 for line in self._lines()[:count]))

    def keep_of(self, is_own: Callable[[Mapping[str, Any]], bool], count: int) -> None:
        """Of the lines that `is_own` accepts, keep only the first `count`. Lines that it does not
        accept stay, even if they are damaged. An incomplete last line is dropped."""
        if not is_main():
            return
        lines = self._lines()
        excess = set([i for i, line in enumerate(lines) if is_own(_readable(line))][count:])
        kept = b"".join(line + b"\n" for i, line in enumerate(lines) if i not in excess)
        if len(kept) < self.size():
            write_atomically(self.path, kept.decode(errors="replace"))

    def rows(self) -> list[dict[str, Any]]:
        """The objects on all complete lines. Raises: CheckpointError if one of them is damaged."""
        rows = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path}:{number}: damaged ({error}); expected a JSON object"
                ) from None
        return rows

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []


def _readable(line: bytes) -> dict[str, Any]:
    """The object on a line; an empty one if the line is damaged."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def in_parts(
    problems: Sequence[Problem],
    path: Path,
    answer: Callable[[int, Sequence[Problem]], Sequence[Mapping[str, Any]]],
    *,
    at_once: int,
) -> list[dict[str, Any]]:
    """Call `answer` to get a JSON object for every problem, write each object as a line to `path`,
    and return them all. The problems are split into parts of at most `at_once` problems.
    `answer(start, part)` returns the objects of one part. `start` is the index of the part's first
    problem. Parts that are already complete in the file are not computed again."""
    results = JsonLines(path)
    done = len(from_main(results.rows))
    if done < len(problems):  # redo an incomplete part, because samples are drawn part by part
        done -= done % at_once
    results.keep(done)
    for start in range(done, len(problems), at_once):
        for row in answer(start, problems[start : start + at_once]):
            results.append(row)
    return from_main(results.rows)
