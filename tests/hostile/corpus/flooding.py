# Programs that write more than anybody reads.
# %% print for ever
def solution():
    while True:
        print("x" * 1000)
# %% print long lines
def solution():
    for _ in range(10 ** 6):
        print("x" * 10 ** 6)
    return 1
# %% print to stderr
import sys
def solution():
    while True:
        print("x" * 1000, file=sys.stderr)
# %% print without a line break
def solution():
    while True:
        print("x", end="", flush=True)
# %% write to standard output
import sys
def solution():
    while True:
        sys.stdout.write("x" * 10 ** 5)
# %% os.write to every descriptor
import os
def solution():
    while True:
        for descriptor in range(64):
            try:
                os.write(descriptor, b"x" * 10 ** 5)
            except OSError:
                pass
# %% os.write of line breaks
import os
def solution():
    for descriptor in range(64):
        try:
            for _ in range(1000):
                os.write(descriptor, b"\n" * 10 ** 4)
        except OSError:
            pass
    return 1
# %% standard output is closed
import os
def solution():
    for descriptor in range(64):
        try:
            os.close(descriptor)
        except OSError:
            pass
    return 1
# %% warnings without end
import warnings
def solution():
    i = 0
    while True:
        i += 1
        warnings.warn(str(i))
# %% control characters in the error
def solution():
    raise ValueError("\x1b[2J\x1b]0;owned\x07\x1b[31m\r\b")
# %% control characters in the value
def solution():
    return "\x1b[2J\x1b]0;owned\x07"
# %% half characters in the error
def solution():
    raise ValueError("\ud800" * 1000)
# %% half characters in the value
def solution():
    return "\ud800" * 1000
# %% a name of half a megabyte in the error
def solution():
    return getattr(1, "a" * 500_000)
# %% a file that fills the disk
def solution():
    with open(FOLDER + "/flood", "w") as file:
        while True:
            file.write("x" * 10 ** 6)
# %% a file in its own folder that fills the disk
def solution():
    with open("flood", "w") as file:
        while True:
            file.write("x" * 10 ** 6)
# %% thousands of files
def solution():
    for number in range(100_000):
        open(FOLDER + "/" + str(number), "w").close()
    return 1
# %% html and script in the error
def solution():
    raise ValueError("</script><script>alert(1)</script>")
