# Programs that read a secret file, or write where they must not.
# %% open and read
def solution():
    return open(SECRET_FILE).read()
# %% open in binary
def solution():
    with open(SECRET_FILE, "rb") as file:
        return file.read().decode()
# %% io.open
import io
def solution():
    return io.open(SECRET_FILE).read()
# %% io.FileIO
import io
def solution():
    return io.FileIO(SECRET_FILE).read().decode()
# %% _io.open
import _io
def solution():
    return _io.open(SECRET_FILE).read()
# %% codecs.open
import codecs
def solution():
    return codecs.open(SECRET_FILE, encoding="utf-8").read()
# %% os.open and os.read
import os
def solution():
    return os.read(os.open(SECRET_FILE, os.O_RDONLY), 100).decode()
# %% posix.open
import posix
def solution():
    return posix.read(posix.open(SECRET_FILE, posix.O_RDONLY), 100).decode()
# %% pathlib
from pathlib import Path
def solution():
    return Path(SECRET_FILE).read_text()
# %% linecache
import linecache
def solution():
    return linecache.getline(SECRET_FILE, 1).strip()
# %% fileinput
import fileinput
def solution():
    return next(iter(fileinput.input(SECRET_FILE)))
# %% tokenize.open
import tokenize
def solution():
    return tokenize.open(SECRET_FILE).read()
# %% mmap
import mmap, os
def solution():
    return mmap.mmap(os.open(SECRET_FILE, os.O_RDONLY), 0, prot=mmap.PROT_READ)[:].decode()
# %% configparser
import configparser
def solution():
    parser = configparser.ConfigParser(allow_no_value=True)
    try:
        parser.read(SECRET_FILE)
    except configparser.MissingSectionHeaderError as error:
        return error.line.strip()
# %% csv
import csv
def solution():
    return next(csv.reader(open(SECRET_FILE)))[0]
# %% importlib resources
import importlib.util
def solution():
    spec = importlib.util.spec_from_file_location("secret", SECRET_FILE + ".py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.get_data(SECRET_FILE)
    return spec.loader.get_data(SECRET_FILE).decode()
# %% through the working folder of its parent
def solution():
    return open("/proc/" + str(PARENT) + "/root" + SECRET_FILE).read()
# %% through its own root in proc
def solution():
    return open("/proc/self/root" + SECRET_FILE).read()
# %% through a link
import os
def solution():
    os.symlink(SECRET_FILE, FOLDER + "/link")
    return open(FOLDER + "/link").read()
# %% through a hard link
import os
def solution():
    os.link(SECRET_FILE, FOLDER + "/hard")
    return open(FOLDER + "/hard").read()
# %% from another folder
import os
def solution():
    os.chdir(os.path.dirname(SECRET_FILE))
    return open(os.path.basename(SECRET_FILE)).read()
# %% os.listdir tells names
import os
def solution():
    return [name for name in os.listdir(FOLDER) if name.startswith("name-")][0][5:]
# %% os.scandir tells names
import os
def solution():
    return [entry.name for entry in os.scandir(FOLDER) if entry.name.startswith("name-")][0][5:]
# %% glob tells names
import glob
def solution():
    return glob.glob(FOLDER + "/name-*")[0].rpartition("name-")[2]
# %% os.walk tells names
import os
def solution():
    for _, _, names in os.walk(FOLDER):
        for name in names:
            if name.startswith("name-"):
                return name[5:]
# %% write a file
def solution():
    with open(FOLDER + "/written", "w") as file:
        file.write("x")
    return 1
# %% write without closing or returning
def solution():
    file = open(FOLDER + "/written", "w", buffering=1)
    file.write("x\n")
    while True:
        pass
# %% append to the secret
def solution():
    with open(SECRET_FILE, "a") as file:
        file.write("0")
    return 1
# %% truncate the secret
import os
def solution():
    os.truncate(SECRET_FILE, 0)
    return 1
# %% remove the secret
import os
def solution():
    os.remove(SECRET_FILE)
    return 1
# %% rename the secret
import os
def solution():
    os.rename(SECRET_FILE, FOLDER + "/moved")
    return 1
# %% make a folder
import os
def solution():
    os.makedirs(FOLDER + "/a/b/c")
    return 1
# %% remove a tree
import shutil
def solution():
    shutil.rmtree(FOLDER)
    return 1
# %% change permissions
import os
def solution():
    os.chmod(SECRET_FILE, 0o777)
    return 1
# %% set the time of a file
import os
def solution():
    os.utime(SECRET_FILE, (0, 0))
    return 1
# %% make a pipe in the file system
import os
def solution():
    os.mkfifo(FOLDER + "/pipe")
    return 1
# %% copy a file
import shutil
def solution():
    shutil.copy(SECRET_FILE, FOLDER + "/copy")
    return open(FOLDER + "/copy").read()
# %% a database on disk
import sqlite3
def solution():
    database = sqlite3.connect(FOLDER + "/database")
    database.execute("create table t (x)")
    database.commit()
    return 1
# %% a temporary file in the folder
import tempfile
def solution():
    return tempfile.NamedTemporaryFile(dir=FOLDER, delete=False).name
# %% a module written and imported
import sys
def solution():
    open(FOLDER + "/planted.py", "w").write("value = open(%r).read()" % SECRET_FILE)
    sys.path.insert(0, FOLDER)
    import planted
    return planted.value
# %% errors are caught and something innocent returned
def solution():
    try:
        return open(SECRET_FILE).read()
    except BaseException:
        pass
    try:
        open(FOLDER + "/written", "w").write("x")
    except BaseException:
        pass
    return 7
