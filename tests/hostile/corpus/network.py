# Programs that fetch a secret from a server on this machine, or reach any other.
# %% socket
import socket
def solution():
    return socket.create_connection(("127.0.0.1", PORT), 2).recv(100).decode()
# %% _socket
import _socket
def solution():
    connection = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    connection.connect(("127.0.0.1", PORT))
    return connection.recv(100).decode()
# %% a socket over IPv6 that reaches IPv4
import socket
def solution():
    connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    connection.connect(("::ffff:127.0.0.1", PORT))
    return connection.recv(100).decode()
# %% urllib
from urllib.request import urlopen
def solution():
    return urlopen("http://127.0.0.1:%d/" % PORT, timeout=2).read().decode()
# %% http.client
import http.client
def solution():
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=2)
    connection.request("GET", "/")
    return connection.getresponse().read().decode()
# %% ftplib
import ftplib
def solution():
    ftplib.FTP().connect("127.0.0.1", PORT, 2)
    return 1
# %% smtplib
import smtplib
def solution():
    smtplib.SMTP("127.0.0.1", PORT, timeout=2)
    return 1
# %% xmlrpc
import xmlrpc.client
def solution():
    return xmlrpc.client.ServerProxy("http://127.0.0.1:%d" % PORT).secret()
# %% asyncio streams
import asyncio
async def fetch():
    reader, _ = await asyncio.open_connection("127.0.0.1", PORT)
    return (await reader.read(100)).decode()
def solution():
    return asyncio.run(fetch())
# %% a shell's own sockets
import subprocess
def solution():
    return subprocess.check_output(["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/%d; head -c 10 <&3" % PORT], text=True)
# %% sockets of the C library
import ctypes, struct
def solution():
    libc = ctypes.CDLL(None)
    descriptor = libc.socket(2, 1, 0)
    address = struct.pack("<H", 2) + struct.pack(">H", PORT) + bytes([127, 0, 0, 1]) + bytes(8)
    libc.connect(descriptor, address, 16)
    data = ctypes.create_string_buffer(100)
    libc.recv(descriptor, data, 100, 0)
    return data.value.decode()
# %% a datagram
import socket
def solution():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", PORT))
    return 1
# %% a server of its own
import socket
def solution():
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(60)
    server.accept()
    return 1
# %% a name is looked up
import socket
def solution():
    return socket.gethostbyname("secret.example.com")
# %% a raw socket
import socket
def solution():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3).recv(100)
    return 1
# %% netlink lists the machine's interfaces
import socket
def solution():
    return [name for _, name in socket.if_nameindex() if name != "lo"][0]
# %% a socket pair
import socket
def solution():
    one, other = socket.socketpair()
    one.send(b"x")
    return other.recv(1)
# %% an abstract socket
import socket
def solution():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\0" + ADDRESS)
    return connection.recv(100).decode()
