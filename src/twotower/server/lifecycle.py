"""Runs a server as a process: its socket, and a shutdown that lets running requests finish."""

import logging
import socket
import ssl
from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from twotower.engine.aio import AsyncEngine
from twotower.server.config import ServerConfig

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger(__name__)


class _AnnouncedServer(uvicorn.Server):
    """Logs the address with further fields once it takes requests."""

    def __init__(self, settings: uvicorn.Config, fields: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._fields = fields

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            logger.info("serving", extra={"fields": {"url": url, **self._fields}})


def check_certificate(config: ServerConfig) -> None:
    """Raises ValueError where the certificate for HTTPS and its key can't be read or don't belong together."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # TLS errors are among them
        key = "" if config.ssl_keyfile is None else f" with the key {config.ssl_keyfile}"
        raise ValueError(
            f"the certificate {config.ssl_certfile}{key} can't be used: {error}; give PEM files"
        ) from error


def run(app: FastAPI, engine: AsyncEngine, config: ServerConfig) -> None:
    """`run_app` with an engine that works until then."""
    fields: dict[str, str] = {"mode": config.default_mode}
    for tower, backend in engine.model.backends.items():
        fields[tower.replace(" ", "_")] = f"{backend.name} ({backend.reason})"
    engine.start()
    try:
        run_app(app, config, fields)
    finally:
        engine.close()


def run_app(app: ASGIApp, config: ServerConfig, fields: Mapping[str, Any]) -> None:
    """Serves until SIGINT or SIGTERM, then takes no more requests and returns when the running ones have finished.

    It waits for them for `shutdown_seconds` at most; a second signal ends the server at once. The log has `fields` with
    the address once requests are taken.
    """
    if config.host not in _LOOPBACK and not config.api_keys:
        message = "%s is reachable from other machines and there is no API key: anyone may use this server"
        logger.warning(message, config.host)
    _AnnouncedServer(uvicorn_settings(app, config), fields).run()


def uvicorn_settings(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        # Where httptools is installed, uvicorn would take that, which loses the body of a request that offers HTTP/2,
        # as every one of Java's HttpClient does.
        http="h11",
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=config.shutdown_seconds,
    )
