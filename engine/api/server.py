"""The service's own thread: a socket that is bound before anything is loaded, and uvicorn on it."""

import contextlib
import resource
import socket
import threading
from functools import partial

import uvicorn

from engine.api.app import make_app
from engine.api.connection import Connection
from engine.api.service import Service

OWN_FILES = 512
"""That a rank has open beside its clients: shards, logs, the other ranks, refused connections that linger."""

_STARTED_WITHIN_S = 30.0
_STOPPED_WITHIN_S = 5.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens to nobody yet; port 0 takes a free one.

    Raises
    ------
    OSError
        If the address is not this host's, or the port is taken; names both and the key of the config.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"engine.host: {host}: {error.strerror or error}") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise OSError(f"engine.port: {host}:{port}: {error.strerror}; use another, or 0 for any free one") from None
    return found


def allow_files(connections: int) -> None:
    """Let this process have as many files open as connections need, beside its own.

    Raises
    ------
    OSError
        If that is more than it may have; names the key of the config.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OWN_FILES
    if most != resource.RLIM_INFINITY and needed > most:
        raise OSError(
            f"engine.limits.connections: {connections} need {needed} open files, and a process may have {most} "
            f"(ulimit -Hn); use {max(1, most - OWN_FILES)} or less"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


class Server:
    """Serves a service on a bound socket, in a thread."""

    def __init__(self, service: Service, bound: socket.socket) -> None:
        self._socket = bound
        self.port: int = bound.getsockname()[1]
        limits = service.limits
        connection = partial(
            Connection,
            most=limits.connections,
            client_s=limits.client_s,
            failed=service.metrics.failed,
            lingering=set(),
        )
        config = uvicorn.Config(
            make_app(service),
            http=connection,
            log_level="error",  # of what clients do wrong they are told; they must not fill rank 0's log
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=int(_STOPPED_WITHIN_S),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Returns when it answers. Raises `RuntimeError` if it does not."""
        self._thread.start()
        waited = threading.Event()
        for _ in range(int(_STARTED_WITHIN_S / 0.05)):
            if self._server.started:
                return
            if not self._thread.is_alive():
                break
            waited.wait(0.05)
        raise RuntimeError("the HTTP service did not start; see the log")

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no more connections, let those that are answered be, then close the rest."""
        self._server.should_exit = True
        self._thread.join(_STOPPED_WITHIN_S + 1)

    def _run(self) -> None:
        with contextlib.closing(self._socket):
            self._server.run(sockets=[self._socket])
