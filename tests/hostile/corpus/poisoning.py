# Programs that leave something behind for the program after them.
# %% a module's constant
import math
math.pi = 3
def solution():
    return 1
# %% built-in names
int = str = float = sum = len = range = abs = max = min = round = lambda *_: NEIGHBOUR
def solution():
    return 1
# %% built-in names for others
import builtins
builtins.sum = builtins.len = builtins.range = lambda *_: 0
def solution():
    return 1
# %% a function of a module
import math
math.sqrt = math.floor = math.ceil = lambda *_: 0
def solution():
    return 1
# %% a class of the standard library
import collections
collections.Counter.update = lambda *_: None
def solution():
    return 1
# %% a planted module
import sys
sys.modules["math"] = sys.modules["random"] = None
def solution():
    return 1
# %% a path to modules
import sys
sys.path.insert(0, FOLDER)
sys.path_hooks.clear()
sys.meta_path.clear()
def solution():
    return 1
# %% a global name
shared = "left behind"
apples = eaten = 10 ** 6
def solution():
    return 1
# %% a global name from inside
def solution():
    global apples, left_behind
    apples = left_behind = 10 ** 6
    return 1
# %% the seed
import random
random.seed(0)
random.random = lambda: 0.5
def solution():
    return 1
# %% the decimal context
import decimal
decimal.getcontext().prec = 1
decimal.DefaultContext.prec = 1
def solution():
    return 1
# %% the recursion limit
import sys
sys.setrecursionlimit(5)
def solution():
    return 1
# %% the locale
import locale
locale.setlocale(locale.LC_ALL, "C")
def solution():
    return 1
# %% the time zone
import os, time
os.environ["TZ"] = "Asia/Tokyo"
time.tzset()
def solution():
    return 1
# %% the working folder
import os
os.chdir("/")
def solution():
    return 1
# %% the file mask
import os
os.umask(0o777)
def solution():
    return 1
# %% the cache of a function
import functools
@functools.lru_cache
def remembered(x):
    return x
remembered(5)
def solution():
    return remembered(5)
# %% an exit handler
import atexit
atexit.register(print, "left behind")
def solution():
    return 1
# %% a default argument
def solution(left=[]):
    left.append(1)
    return len(left)
# %% a trace of every call
import sys
sys.settrace(lambda *_: 1 / 0)
def solution():
    return 1
# %% a thread that stays
import threading, time
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
def solution():
    return 1
# %% a file in the folder for temporary ones
import os
def solution():
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "."):
        try:
            open(folder + "/reftune-left-behind", "w").write("x")
        except OSError:
            pass
    return 1
# %% shared memory
from multiprocessing import shared_memory
def solution():
    shared_memory.SharedMemory("reftune-left-behind", create=True, size=100)
    return 1
# %% a worker that dies
import ctypes
def solution():
    ctypes.memset(0, 0, 100)
# %% a worker that is out of memory
def solution():
    return [0] * 10 ** 10
# %% a worker whose time is up
def solution():
    numbers = []
    while True:
        numbers = [len(numbers)]
# %% a result that comes late
import os
def solution():
    for descriptor in range(64):
        try:
            os.write(descriptor, b"V1\n" * 3)
        except OSError:
            pass
    return 2
