# Programs that nest deeper than a stack, in running or in reading.
# %% itself
def solution():
    return solution()
# %% two by turns
def other():
    return solution()
def solution():
    return other()
# %% caught and gone on
def solution():
    try:
        return solution()
    except RecursionError:
        return solution()
# %% a limit raised
import sys
def solution():
    sys.setrecursionlimit(10 ** 9)
    def down(n):
        return down(n + 1)
    return down(0)
# %% a lambda of itself
solution = lambda: (lambda f: f(f))(lambda f: f(f))
# %% __getattr__
class Deep:
    def __getattr__(self, name):
        return getattr(self, name + "x")
def solution():
    return Deep().x
# %% __repr__
class Deep:
    def __repr__(self):
        return repr(self)
def solution():
    return repr(Deep())
# %% __eq__
class Deep:
    def __eq__(self, other):
        return other == self
def solution():
    return Deep() == Deep()
# %% __hash__
class Deep:
    def __hash__(self):
        return hash(self)
def solution():
    return hash(Deep())
# %% comparison of deep lists
def solution():
    a, b = [], []
    for _ in range(10 ** 5):
        a, b = [a], [b]
    return a == b
# %% the text of a deep list
def solution():
    a = []
    for _ in range(10 ** 5):
        a = [a]
    return len(str(a))
# %% a deep list is returned
def solution():
    a = []
    for _ in range(10 ** 5):
        a = [a]
    return a
# %% a deep dictionary is returned
def solution():
    a = {}
    for _ in range(10 ** 5):
        a = {"a": a}
    return a
# %% a copy of a deep list
import copy
def solution():
    a = []
    for _ in range(10 ** 5):
        a = [a]
    return len(copy.deepcopy(a))
# %% a deep list is dropped
def solution():
    a = ()
    for _ in range(10 ** 6):
        a = (a,)
    return 1
# %% brackets
def solution():
    return eval("(" * 10 ** 5 + ")" * 10 ** 5)
# %% unary signs
def solution():
    return eval("-" * 10 ** 5 + "1")
# %% a long chain of additions
def solution():
    return eval("+".join(["1"] * 10 ** 5))
# %% a long chain of attributes
def solution():
    return eval("a" + ".a" * 10 ** 5)
# %% deep json
import json
def solution():
    return json.loads("[" * 10 ** 5 + "]" * 10 ** 5)
# %% a deep regular expression
import re
def solution():
    return re.compile("(" * 10 ** 5 + ")" * 10 ** 5).groups
# %% a generator of generators
def solution():
    iterator = iter([1])
    for _ in range(10 ** 5):
        iterator = (x for x in iterator)
    return next(iterator)
# %% functools.reduce of compositions
import functools
def solution():
    function = functools.reduce(lambda f, g: lambda x: g(f(x)), [abs] * 10 ** 5)
    return function(1)
