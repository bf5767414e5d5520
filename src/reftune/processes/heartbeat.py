"""Detects dead processes: every second, each process notes in a shared store that it is alive, and
checks the others. Without these checks, a collective operation would wait for hours for a dead
process, or fail without naming that process. Heartbeats are sent by a separate thread, so a process
that computes or writes for a long time still counts as alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

INTERVAL_S = 1.0
SOON_S = 4.0
"""If an error has occurred in this process, another process counts as dead after this many seconds
of silence."""
SILENCE_S = 45.0
"""If no error has occurred in this process, another process counts as dead after this many seconds
of silence. This limit is higher than `SOON_S` because a library may block Python's threads for
several seconds."""
LEFT = b"left"


class Heartbeat:
    """Sends this process's heartbeats, and watches the heartbeats of the other processes."""

    def __init__(self, store: Any, rank: int, size: int, lost: Callable[[int], None]) -> None:
        """`store` is used for heartbeats only. A thread calls `lost` with the rank of a process
        that has been silent for more than `SILENCE_S` seconds."""
        self._store, self._rank, self._lost = store, rank, lost
        self._others = [other for other in range(size) if other != rank]
        self._heard = {other: (b"", time.monotonic()) for other in self._others}
        self._over = threading.Event()
        self._store.set(_key(rank), "0")

    def start(self) -> None:
        """Begin to send and watch heartbeats. Call this after every process has created its
        `Heartbeat`."""
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this process is done, so that they do not report it as dead."""
        self.stop()
        self._exchange(LEFT)

    def stop(self) -> None:
        self._over.set()

    def missing(self) -> int | None:
        """The rank of another process that has been silent for more than `SOON_S` seconds. Returns
        None if no such process is found within 2 × `SOON_S` seconds. Call this after an error in
        this process."""
        deadline = time.monotonic() + 2 * SOON_S
        while time.monotonic() < deadline:
            rank, silent_s = self._most_silent()
            if silent_s > SOON_S:
                return rank
            time.sleep(INTERVAL_S / 4)
        return None

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(INTERVAL_S):
            count += 1
            self._exchange(str(count).encode())

    def _watch(self) -> None:
        """Check the other processes. This runs in a thread of its own, because a store whose host
        is gone may block `_beat`."""
        while not self._over.wait(INTERVAL_S):
            rank, silent_s = self._most_silent()
            if silent_s > SILENCE_S:
                self._lost(rank)

    def _exchange(self, own: bytes) -> None:
        try:
            self._store.set(_key(self._rank), own)
            beats = self._store.multi_get([_key(other) for other in self._others])
        except RuntimeError:
            if self._rank != 0:  # without the main process's store, all others seem silent
                self._others = [0]
            return
        now = time.monotonic()
        for other, beat in zip(self._others, beats, strict=True):
            if beat == LEFT or beat != self._heard[other][0]:
                self._heard[other] = beat, now

    def _most_silent(self) -> tuple[int, float]:
        """The rank of the process (other than this one) that has been silent longest, and the
        length of its silence in seconds. The silence of a process that has called `leave` counts as
        0."""
        now = time.monotonic()
        rank = min(self._others, key=lambda other: self._heard[other][1])
        beat, at = self._heard[rank]
        return rank, 0.0 if beat == LEFT else now - at


def _key(rank: int) -> str:
    return f"reftune/alive/{rank}"
