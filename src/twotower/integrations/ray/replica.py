"""One replica: an engine with a whole server on a port of its own, which answers its routers alone."""

import contextlib
import dataclasses
import logging
import os
import socket
import threading

import torch
import uvicorn

import twotower
from twotower.checkpoints.chat_template import ChatTemplate
from twotower.checkpoints.hf import resolve
from twotower.checkpoints.hf.special_tokens import read_special_tokens
from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.engine.aio import AsyncEngine
from twotower.engine.memory_report import memory_fields
from twotower.integrations.ray.choice import Member
from twotower.integrations.ray.config import Launch
from twotower.integrations.ray.trust import IDLE_SECONDS, TakenId
from twotower.server.app import make_app
from twotower.server.connections import raise_descriptor_limit
from twotower.server.lifecycle import uvicorn_settings
from twotower.server.logs import log_to_stderr

logger = logging.getLogger(__name__)


class ReplicaServer:
    """Loads the model and serves it at `host` from when it is made until `close`.

    Raises ValueError for a model or a template that can't be used.
    """

    def __init__(self, launch: Launch, host: str) -> None:
        folder = DEFAULT_CHECKPOINT if launch.model is None else resolve(launch.model)
        if launch.template is None:
            template = ChatTemplate.load(folder)
        else:
            template = ChatTemplate(launch.template, read_special_tokens(folder))
        # Not the machine's, nor its container's: other replicas compute beside this one.
        torch.set_num_threads(max(int(launch.cpus), 1))
        model = twotower.load(
            folder,
            device=launch.device,
            dtype=launch.dtype,
            context_device=launch.context_device,
            denoiser_device=launch.denoiser_device,
        )
        self._log = contextlib.ExitStack()
        self._log.enter_context(log_to_stderr(launch.server.log_level))
        fraction = launch.memory_fraction(os.cpu_count() or 1)
        limits = dataclasses.replace(launch.limits, max_context=launch.server.max_context, memory_fraction=fraction)
        self.engine = AsyncEngine(model, limits)
        logger.info("memory", extra={"fields": memory_fields(self.engine.plan)})
        # What stands between the router and clients is the router's.
        config = dataclasses.replace(
            launch.server, cors_origins=(), ssl_certfile=None, ssl_keyfile=None, idle_seconds=IDLE_SECONDS
        )
        self._most_seconds = config.shutdown_seconds
        raise_descriptor_limit()
        app = make_app(self.engine, config, template)
        self.metrics = app.service.metrics
        self._socket = socket.create_server((host, 0), backlog=2048)
        self._server = uvicorn.Server(uvicorn_settings(TakenId(app, launch.secret), config))
        self.engine.start()
        sockets = [self._socket]
        self._thread = threading.Thread(target=self._server.run, args=(sockets,), name="twotower-http", daemon=True)
        self._thread.start()

    def member(self, name: str) -> Member:
        """Where the server answers, and how many requests it takes."""
        host, port = self._socket.getsockname()[:2]
        room = self.engine.config.max_num_requests + self.engine.config.max_num_waiting
        return Member(name, f"http://{f'[{host}]' if ':' in host else host}:{port}", room)

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and self.engine.is_running and not self._server.should_exit

    def close(self) -> None:
        """Takes no more requests, and returns when the running ones have ended, for which they have
        `shutdown_seconds`."""
        self.engine.drain()
        ending = threading.Timer(self._most_seconds, self.engine.abandon)
        ending.daemon = True
        ending.start()
        self._server.should_exit = True
        self._thread.join()
        ending.cancel()
        self.engine.close()
        self._log.close()
