# Programs that start other programs, outlive their own, or reach into other processes.
# %% os.system
import os
def solution():
    os.system("touch " + FOLDER + "/by-shell")
    return 1
# %% subprocess
import subprocess
def solution():
    return subprocess.check_output(["cat", SECRET_FILE], text=True)
# %% os.popen
import os
def solution():
    return os.popen("cat " + SECRET_FILE).read()
# %% os.execv
import os
def solution():
    os.execv("/bin/sh", ["sh", "-c", "touch " + FOLDER + "/by-exec"])
# %% os.posix_spawn
import os
def solution():
    os.posix_spawn("/bin/sh", ["sh", "-c", "touch " + FOLDER + "/by-spawn"], {})
    return 1
# %% _posixsubprocess
import _posixsubprocess, os
def solution():
    return _posixsubprocess.fork_exec
# %% os.fork
import os, time
def solution():
    if os.fork() == 0:
        open(FOLDER + "/by-child", "w").write("x")
        os._exit(0)
    time.sleep(1)
    return 1
# %% a fork bomb
import os
def solution():
    while True:
        os.fork()
# %% a child in a session of its own
import os, time
def solution():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(2)
            open(FOLDER + "/by-daemon", "w").write("x")
        os._exit(0)
    return 1
# %% a session of its own, then for ever
import os
def solution():
    os.setsid()
    while True:
        pass
# %% a process group of its own, then for ever
import os
def solution():
    os.setpgid(0, 0)
    while True:
        pass
# %% multiprocessing
import multiprocessing
def work():
    open(FOLDER + "/by-multiprocessing", "w").write("x")
def solution():
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return 1
# %% a pool of processes
from concurrent.futures import ProcessPoolExecutor
def solution():
    with ProcessPoolExecutor(64) as pool:
        return sum(pool.map(abs, range(64)))
# %% threads
import threading
def solution():
    def spin():
        while True:
            pass
    threads = [threading.Thread(target=spin) for _ in range(64)]
    for thread in threads:
        thread.start()
    return 1
# %% threads below threading
import _thread
def solution():
    while True:
        _thread.start_new_thread(lambda: [0] * 10 ** 6, ())
# %% a pty
import pty
def solution():
    pty.spawn(["touch", FOLDER + "/by-pty"])
    return 1
# %% fork of the C library
import ctypes
def solution():
    ctypes.CDLL(None).fork()
    return 1
# %% system of the C library
import ctypes
def solution():
    ctypes.CDLL(None).system(b"touch " + FOLDER.encode() + b"/by-libc")
    return 1
# %% clone, without the C library's wrapper
import ctypes
def solution():
    return ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)
# %% tracing its parent
import ctypes
def solution():
    return ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) or 1
# %% reading its parent with process_vm_readv
import ctypes
def solution():
    return ctypes.CDLL(None, use_errno=True).process_vm_readv(PARENT, None, 0, None, 0, 0)
# %% the limits of its parent
import resource
def solution():
    resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (3, 3))
    return 1
# %% its own limits raised
import resource
def solution():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return len(bytearray(2 * 10 ** 9))
# %% the priority of its parent
import os
def solution():
    os.setpriority(os.PRIO_PROCESS, PARENT, 19)
    return 1
