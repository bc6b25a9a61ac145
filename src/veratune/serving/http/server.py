"""HttpServer: uvicorn with a socket without delays, time-outs for slow clients, and draining on
SIGTERM.
"""

import asyncio
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from veratune.errors import ConfigError
from veratune.serving.service import Service

CLOSE_TIMEOUT = 5  # seconds for connections to end after draining


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before models are loaded, so that a wrong one is reported at once.

    Args:
        host: The address.
        port: The port; 0 takes a free one.

    Returns:
        A socket that does not listen yet.

    Raises:
        ConfigError: The address is taken or does not exist.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on its connections; without, every response
    # on a reused connection waits 40 ms for a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {port} of {host} cannot be had: {error.strerror}; give another --port "
            "(0 takes a free one) or --host"
        ) from None
    return listener


class HttpServer(uvicorn.Server):
    """Runs an application until SIGTERM or SIGINT.

    The first signal drains: /ready is 503 and new requests are refused, while running requests have
    `shutdown_timeout` seconds to finish and the port stays open. A second signal ends at once.
    """

    def __init__(
        self, app: FastAPI, service: Service, *, shutdown_timeout: float, header_timeout: float
    ) -> None:
        """Prepare; `run` serves.

        Args:
            app: The application.
            service: Is told to drain.
            shutdown_timeout: Seconds for running requests to finish.
            header_timeout: Seconds for a client to send a request's headers.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=_timed_protocol(header_timeout),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=CLOSE_TIMEOUT,
                server_header=False,
            )
        )
        self.service, self.shutdown_timeout = service, shutdown_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        threading.Thread(target=self._drain, name="veratune-drain", daemon=True).start()

    def _drain(self) -> None:
        deadline = time.monotonic() + self.shutdown_timeout
        while not self.service.idle and time.monotonic() < deadline and not self.should_exit:
            time.sleep(0.02)
        self.service.close()  # what still runs is answered with 503 while the port is open
        self.should_exit = True


def _timed_protocol(timeout: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which closes a connection whose request headers take over `timeout`.

    uvicorn limits the time between two requests only, so clients that send nothing, or a byte now
    and then, would hold their descriptors for ever.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._update_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _update_timer(self) -> None:
            between = self.cycle is None or self.cycle.response_complete
            if not between and self._timer is not None:
                self._timer.cancel()
                self._timer = None
            elif between and self._timer is None:
                self._timer = self.loop.call_later(timeout, self._close_if_waiting)

        def _close_if_waiting(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return TimedProtocol
