# Programs that look for a secret in the environment, in the parent or in what the sandbox passed on.
# %% os.environ
import os
def solution():
    return os.environ["REFTUNE_SECRET"]
# %% os.getenv
import os
def solution():
    return os.getenv("REFTUNE_SECRET")
# %% os.environb
import os
def solution():
    return os.environb[b"REFTUNE_SECRET"].decode()
# %% posix.environ
import posix
def solution():
    return posix.environ[b"REFTUNE_SECRET"].decode()
# %% os.path.expandvars
import os.path
def solution():
    return os.path.expandvars("$REFTUNE_SECRET")
# %% the environment in proc
def solution():
    data = open("/proc/self/environ").read()
    return [pair for pair in data.split("\0") if pair.startswith("REFTUNE_SECRET=")][0].partition("=")[2]
# %% the parent's environment in proc
def solution():
    data = open("/proc/%d/environ" % PARENT).read()
    return [pair for pair in data.split("\0") if pair.startswith("REFTUNE_SECRET=")][0].partition("=")[2]
# %% os.getppid and its environment
import os
def solution():
    data = open("/proc/%d/environ" % os.getppid()).read()
    return [pair for pair in data.split("\0") if pair.startswith("REFTUNE_SECRET=")][0].partition("=")[2]
# %% a shell's environment
import os
def solution():
    return os.popen("echo $REFTUNE_SECRET").read().strip()
# %% subprocess with the inherited environment
import subprocess, sys
def solution():
    return subprocess.check_output([sys.executable, "-c", "import os; print(os.environ['REFTUNE_SECRET'])"], text=True).strip()
# %% getenv of the C library
import ctypes
def solution():
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    return libc.getenv(b"REFTUNE_SECRET").decode()
# %% environ of the C library
import ctypes
def solution():
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    index = 0
    while environ[index]:
        name, _, value = environ[index].decode().partition("=")
        if name == "REFTUNE_SECRET":
            return value
        index += 1
# %% every open descriptor
import os
def solution():
    for descriptor in range(3, 64):
        try:
            data = os.pread(descriptor, 1000, 0)
        except OSError:
            continue
        if data:
            return data.decode()
# %% the parent's memory
def solution():
    with open("/proc/%d/maps" % PARENT) as maps, open("/proc/%d/mem" % PARENT, "rb") as memory:
        for line in maps:
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            if "heap" in line:
                memory.seek(start)
                data = memory.read(end - start)
                at = data.find(b"REFTUNE_SECRET=")
                if at >= 0:
                    return data[at + 15 : at + 40].split(b"\0")[0].decode()
# %% the command line of the parent
def solution():
    return open("/proc/%d/cmdline" % PARENT).read()
# %% its own arguments
import sys
def solution():
    return " ".join(sys.argv)
# %% the user's home
import os
def solution():
    return open(os.path.expanduser("~/.netrc")).read()
# %% the password file
import pwd
def solution():
    return pwd.getpwall()[0].pw_dir
