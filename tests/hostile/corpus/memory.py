# Programs that want all the memory.
# %% a long text
def solution():
    return len("a" * 10 ** 11)
# %% a long list
def solution():
    return len([0] * 10 ** 11)
# %% a list that grows
def solution():
    items = []
    while True:
        items.append("x" * 1000 + str(len(items)))
# %% a text that doubles
def solution():
    text = "a"
    while True:
        text += text
# %% a dictionary that grows
def solution():
    table = {}
    while True:
        table[len(table)] = [len(table)] * 10
# %% a set of tuples
def solution():
    return len({(i, str(i)) for i in range(10 ** 9)})
# %% a large power
def solution():
    return 9 ** 9 ** 9
# %% a large shift
def solution():
    return 1 << 10 ** 12
# %% a factorial
import math
def solution():
    return math.factorial(10 ** 8)
# %% a number that is squared
def solution():
    number = 3
    while True:
        number *= number
# %% bytes
def solution():
    return len(bytearray(10 ** 11))
# %% a range made a list
def solution():
    return len(list(range(10 ** 10)))
# %% permutations in a list
import itertools
def solution():
    return len(list(itertools.permutations(range(14))))
# %% a product in a list
import itertools
def solution():
    return len(list(itertools.product(range(100), repeat=6)))
# %% a format with a large width
def solution():
    return len(f"{1:>{10 ** 11}}")
# %% a percent format with a large width
def solution():
    return len("%*d" % (2 ** 31 - 1, 1))
# %% text.ljust
def solution():
    return len("x".ljust(10 ** 11))
# %% text.replace
def solution():
    return len(("a" * 10 ** 6).replace("a", "b" * 10 ** 6))
# %% text.join
def solution():
    return len(("x" * 10 ** 6).join(["y"] * 10 ** 6))
# %% text.expandtabs
def solution():
    return len("\t\t\t".expandtabs(2 ** 31 - 1))
# %% a regular expression that copies
import re
def solution():
    return len(re.sub("a", "b" * 10 ** 6, "a" * 10 ** 6))
# %% a string of billions of laughs
def solution():
    a = "ha" * 1000
    for _ in range(9):
        a = a * 10
    return len(a)
# %% nested tuples
def solution():
    x = ()
    while True:
        x = (x, x)
# %% nested lists, each with a copy
def solution():
    x = [0]
    while True:
        x = x + x
# %% a value that unfolds when it is written
def solution():
    x = [1]
    for _ in range(60):
        x = [x, x]
    return x
# %% a value that contains itself
def solution():
    x = []
    x.append(x)
    return x
# %% an exception with a large message
def solution():
    raise ValueError("x" * 30_000_000)
# %% an exception chain without end
def solution():
    error = None
    while True:
        try:
            raise ValueError("x" * 10000) from error
        except ValueError as new:
            error = new
# %% a large value is returned
def solution():
    return "9" * 20_000_000
# %% a large number is returned
def solution():
    return 1 << 100_000_000
# %% many large values are returned
def solution():
    return [str(i) * 1000 for i in range(5000)]
# %% an object with a large attribute is returned
class Box:
    def __init__(self):
        self.content = "x" * 20_000_000
def solution():
    return Box()
# %% a memory error is caught again and again
def solution():
    kept = []
    while True:
        try:
            kept.append("x" * 1_000_000 + str(len(kept)))
        except BaseException:
            pass
# %% a default dictionary of dictionaries
from collections import defaultdict
def solution():
    tree = lambda: defaultdict(tree)
    root = tree()
    for i in range(10 ** 9):
        root[i][i][i] = i
    return 1
# %% decimal digits
from decimal import Decimal, getcontext
def solution():
    getcontext().prec = 10 ** 9
    return str(Decimal(1) / Decimal(7))[:5]
# %% json of a large text
import json
def solution():
    return len(json.dumps("\u0001" * 10 ** 9))
