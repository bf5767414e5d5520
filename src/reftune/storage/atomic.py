"""Files and folders that appear by one rename, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from reftune.errors import CheckpointError
from reftune.processes.world import is_main

if TYPE_CHECKING:
    pass


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one rename. Raises: CheckpointError."""
    if not is_main():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        raise refused(path, error) from None


def replace_folder(folder: Path, fill: Any) -> None:
    """`fill(partial)` writes a folder that then takes the place of `folder`. Raises:
    CheckpointError.

    It is called in every process, as weights may have to be gathered; only in the main one it
    writes.
    """
    partial, old = (
        folder.with_name(f".{folder.name}.partial"),
        folder.with_name(f".{folder.name}.old"),
    )
    if not is_main():
        fill(partial)
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        fill(partial)
        sync_files(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise refused(folder, error) from None


def link_files(source: Path, target: Path) -> None:
    """Put the files of `source` into `target` too, without a second copy if the disk allows it.
    Raises: CheckpointError."""
    if not is_main():
        return
    try:
        for path in (path for path in source.rglob("*") if path.is_file()):
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            try:
                link.hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
    except OSError as error:
        raise refused(target, error) from None


def refused(path: Path, error: OSError | SafetensorError) -> CheckpointError:
    """The error to raise if the disk refuses `path`."""
    return CheckpointError(
        f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}"
    )


def sync_files(folder: Path) -> None:
    """`sync` everything in `folder`."""
    for path in folder.rglob("*"):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a power cut. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
