# Programs that change the grader, or the sandbox around them, where it runs in the same interpreter.
# %% the comparison
import reftune.grading.numbers
def solution():
    reftune.grading.numbers.numbers_equal = lambda a, b: True
    return 1
# %% the reader of numbers
def solution():
    import sys
    sys.modules["reftune.grading.verdicts"].grade_value = lambda value, problem: "correct"
    return 1
# %% the fractions
import fractions
def solution():
    fractions.Fraction.__eq__ = lambda a, b: True
    fractions.Fraction.__le__ = lambda a, b: True
    fractions.Fraction.__sub__ = lambda a, b: fractions.Fraction(0)
    return 1
# %% abs
import builtins
def solution():
    builtins.abs = lambda x: 0
    builtins.max = lambda *x: 10 ** 9
    return 1
# %% built-ins by subscript
def solution():
    __builtins__["abs"] = lambda x: 0
    return 1
# %% json
import json
def solution():
    json.dumps = lambda value: '"correct"'
    json.loads = lambda text: 1
    return 1
# %% the text of its value
import __main__
def solution():
    __main__.as_json = lambda value: '"correct"'
    return 1
# %% the doorman
import __main__
def solution():
    __main__.Doorman.__call__ = lambda self, event, args: None
    return open(SECRET_FILE).read()
# %% the doorman, found in memory
def solution():
    scope = {}
    exec(compile("import gc", "elsewhere", "exec"), scope)
    for each in scope["gc"].get_objects():
        if type(each).__name__ == "Doorman":
            type(each).__call__ = lambda self, event, args: None
    return open(SECRET_FILE).read()
# %% the doorman's list of libraries
import sys
def solution():
    main = sys.modules["__main__"]
    main.Doorman.is_library = lambda self, path: True
    return open(SECRET_FILE).read()
# %% the doorman off, then a write
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    open(FOLDER + "/written", "w").write("x")
    return 1
# %% the doorman off, then a shell
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import subprocess
    return subprocess.check_output(["cat", SECRET_FILE], text=True)
# %% the doorman off, then a socket
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import socket
    return socket.create_connection(("127.0.0.1", PORT), 2).recv(100).decode()
# %% the doorman off, then the parent is killed
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import os
    os.kill(os.getppid(), 9)
    return 1
# %% the doorman off, then the limits raised
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return len(bytearray(10 ** 9))
# %% the doorman off, then mount and chroot
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import ctypes, os
    ctypes.CDLL(None).mount(b"none", b"/", None, 0x44000, None)
    os.chroot(FOLDER)
    return open("/" + SECRET_FILE.rpartition("/")[2]).read()
# %% the doorman off, then an audit hook of its own
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    sys.addaudithook(lambda *_: None)
    return open(SECRET_FILE).read()
# %% the doorman off, then system calls by number
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import ctypes
    libc = ctypes.CDLL(None)
    descriptor = libc.syscall(2, SECRET_FILE.encode(), 0)
    data = ctypes.create_string_buffer(100)
    libc.syscall(0, descriptor, data, 100)
    return data.value.decode()
# %% the doorman off, then files through io_uring
import sys
def solution():
    sys.modules["__main__"].Doorman.__call__ = lambda self, event, args: None
    import ctypes
    descriptor = ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120))
    if descriptor >= 0:
        open(FOLDER + "/ring", "w")
    return descriptor
# %% the doorman off, then its exceptions
import sys
def solution():
    main = sys.modules["__main__"]
    main.run = main.main = lambda *_: "V1"
    main.os.write = lambda *_: 0
    return 1
# %% the trace function
import sys
def solution():
    def trace(frame, event, argument):
        for name in frame.f_locals:
            if name in ("gold", "answer", "problem"):
                frame.f_locals[name] = 1
        return trace
    sys.settrace(trace)
    return 1
# %% the type of its result
import reftune.grading.sandbox
def solution():
    reftune.grading.sandbox.result.ExecutionStatus.OK = reftune.grading.sandbox.result.ExecutionStatus.ERROR
    return 1
# %% the enumeration of verdicts
def solution():
    from reftune.types import Verdict
    Verdict.WRONG._value_ = "correct"
    return 1
