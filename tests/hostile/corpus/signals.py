# Programs that signal others, or shrug off the signals that are to end them.
# %% kill the parent
import os
def solution():
    os.kill(PARENT, 9)
    return 1
# %% kill whoever started it
import os
def solution():
    os.kill(os.getppid(), 9)
    return 1
# %% kill its process group
import os
def solution():
    os.killpg(0, 9)
    return 1
# %% kill everybody
import os
def solution():
    os.kill(-1, 9)
    return 1
# %% kill itself
import os
def solution():
    os.kill(os.getpid(), 9)
# %% stop itself
import os, signal
def solution():
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1
# %% abort
import os
def solution():
    os.abort()
# %% an alarm that never comes
import signal
def solution():
    signal.setitimer(signal.ITIMER_REAL, 0)
    while True:
        pass
# %% the alarm is ignored
import signal
def solution():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        pass
# %% the alarm is blocked
import signal
def solution():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
        pass
# %% the alarm is ignored by the C library
import ctypes
def solution():
    ctypes.CDLL(None).signal(14, 1)
    while True:
        pass
# %% a pidfd to the parent
import os, signal
def solution():
    signal.pidfd_send_signal(os.pidfd_open(PARENT), 9)
    return 1
# %% the parent is to get SIGIO
import fcntl, os
def solution():
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, PARENT)
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writing, b"x")
    return 1
# %% a segmentation fault
import ctypes
def solution():
    return ctypes.string_at(0)
# %% a signal is raised in itself
import signal
def solution():
    signal.raise_signal(signal.SIGTERM)
    return 1
# %% faulthandler exits later
import faulthandler
def solution():
    faulthandler.dump_traceback_later(0.01, exit=True)
    while True:
        pass
# %% leave without a word
import os
def solution():
    os._exit(0)
# %% leave with an innocent status
import sys
def solution():
    sys.exit(0)
# %% SystemExit raised by hand
def solution():
    raise SystemExit(1)
# %% KeyboardInterrupt raised by hand
def solution():
    raise KeyboardInterrupt
