# Programs that do not end, or end late.
# %% a loop
def solution():
    while True:
        pass
# %% a loop while the program is read
while True:
    pass
def solution():
    return 1
# %% a loop that catches everything
def solution():
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
# %% a loop in finally
def solution():
    try:
        return 1
    finally:
        while True:
            pass
# %% a loop without statements
def solution():
    return all(True for _ in iter(int, 1))
# %% a sum
def solution():
    return sum(range(10 ** 13))
# %% max of a repetition
import itertools
def solution():
    return max(itertools.repeat(1))
# %% count without end
import itertools
def solution():
    for _ in itertools.count():
        pass
# %% sleep
import time
def solution():
    time.sleep(10 ** 6)
    return 1
# %% sleep in asyncio
import asyncio
async def wait():
    await asyncio.sleep(10 ** 6)
def solution():
    asyncio.run(wait())
    return 1
# %% select without a descriptor
import select
def solution():
    select.select([], [], [], 10 ** 6)
    return 1
# %% a lock taken twice
import threading
def solution():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return 1
# %% read what never comes
import sys
def solution():
    return sys.stdin.read() + input()
# %% a pipe that is never written
import os
def solution():
    reading, writing = os.pipe()
    return os.read(reading, 1)
# %% catastrophic backtracking
import re
def solution():
    return re.match(r"(a+)+$", "a" * 40 + "b") is None
# %% backtracking with a reference
import re
def solution():
    return re.match(r"(a|aa)*\1*b(?=c)(.*)*\2$", "a" * 60) is None
# %% a power modulo nothing
def solution():
    return len(bin(7 ** (10 ** 7)))
# %% a long division
def solution():
    return (10 ** 2_000_000) // (3 ** 1_000_000) % 10
# %% a long number in decimal
def solution():
    return len(str(1 << 4 * 10 ** 6))
# %% Fibonacci without memory
def f(n):
    return n if n < 2 else f(n - 1) + f(n - 2)
def solution():
    return f(60)
# %% Ackermann
def a(m, n):
    return n + 1 if m == 0 else a(m - 1, 1) if n == 0 else a(m - 1, a(m, n - 1))
def solution():
    return a(4, 3)
# %% sort with a hostile key
def solution():
    return sorted(range(10 ** 7), key=lambda x: -x)[0]
# %% a dictionary with equal hashes
class Same:
    def __hash__(self):
        return 1
    def __eq__(self, other):
        return False
def solution():
    return len({Same(): 0 for _ in range(10 ** 6)})
# %% a property without end
class Slow:
    @property
    def value(self):
        while True:
            pass
def solution():
    return Slow().value
# %% an iterator as the value
def solution():
    def forever():
        while True:
            yield 1
    return forever()
# %% a value whose text takes for ever
class Slow:
    def __str__(self):
        while True:
            pass
    __repr__ = __float__ = __str__
def solution():
    return Slow()
# %% a destructor without end
class Slow:
    def __del__(self):
        while True:
            pass
def solution():
    Slow()
    return 1
# %% an exit handler without end
import atexit
def forever():
    while True:
        pass
def solution():
    atexit.register(forever)
    return 1
# %% the call is a loop by another name
class Loop:
    def __call__(self):
        while True:
            pass
solution = Loop()
# %% text is searched in text
def solution():
    return ("a" * 10 ** 6 + "b") in ("a" * 10 ** 7)
# %% a long comprehension of comprehensions
def solution():
    return sum(i * j * k for i in range(10 ** 4) for j in range(10 ** 4) for k in range(10 ** 4))
