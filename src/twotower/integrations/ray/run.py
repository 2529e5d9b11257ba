"""`twotower serve --replicas`: replicas under Ray, and in this process the router in front of them."""

import logging
import re
import threading
from typing import Self

import ray
from ray import serve

from twotower.errors import SettingError
from twotower.integrations.ray.choice import Fleet
from twotower.integrations.ray.config import Launch, ReplicaConfig
from twotower.integrations.ray.deployments import looking, replicas_of
from twotower.integrations.ray.router import Relay, make_router
from twotower.server.lifecycle import Loaded, run
from twotower.server.startup import listen

logger = logging.getLogger(__name__)


class _Application:
    """An application of Ray Serve in the place of an engine: its replicas have the engines."""

    is_running = True  # Ray starts replicas anew
    failure = None

    def __init__(self, name: str, relay: Relay) -> None:
        self._relay = relay
        self._ending = threading.Thread(target=serve.delete, args=(name,), name="twotower-end")

    @property
    def num_unfinished(self) -> int:
        return self._relay.fleet.num_running

    def start(self) -> Self:
        return self

    def drain(self) -> None:
        """Has all replicas drain: Ray waits for them."""
        self._ending.start()

    def abandon(self) -> None:
        """Ends what is unfinished; replicas do the same, but maybe later than clients are waited for."""
        self._relay.abandon()

    def close(self) -> None:
        """Waits for the replicas' end."""
        self._ending.join()


def run_replicas(launch: Launch, config: ReplicaConfig) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, then takes no more requests and returns when the running ones have
    finished.

    The replicas run on the cluster that this machine belongs to or RAY_ADDRESS names, or else under a Ray that is
    started on this machine and ends with this process. Raises SettingError where a machine of its own hasn't the CPUs
    and GPUs, and ValueError for a model that the replicas can't open.
    """
    application = replicas_of(launch, config)
    name = "twotower-" + re.sub(r"\W+", "-", launch.server.model_names[0])
    listening = listen(launch.server)
    ray.init(include_dashboard=False, log_to_driver=True, configure_logging=False)

    def load() -> Loaded:
        try:
            handle = serve.run(application, name=name, route_prefix=None)
        except RuntimeError as error:
            why = _why(name)
            serve.delete(name)
            raise ValueError(f"the replicas don't start: {why}") from error
        relay = Relay(Fleet(), launch.secret)
        router = make_router(relay, launch.server, looking(handle))
        fields = {"mode": launch.server.default_mode, "replicas": config.least}
        return Loaded(router, fields, _Application(name, relay))

    try:
        _check_room(launch, config)
        serve.start(proxy_location="Disabled")
        run(load, launch.server, listening)
    finally:
        ray.shutdown()


def _why(name: str) -> str:
    """The error of a replica that doesn't start, which ends what Ray says of its deployment."""
    [deployment] = serve.status().applications[name].deployments.values()
    return str(deployment.message).rstrip().splitlines()[-1]


def _check_room(launch: Launch, config: ReplicaConfig) -> None:
    """Raises SettingError where Ray has one machine, this one, and the least number of replicas don't fit on it."""
    launch = launch.reserving(config)
    there = ray.cluster_resources()
    if len(ray.nodes()) > 1:
        return
    for kind, each, setting, value in (
        (
            "GPU",
            launch.gpus,
            *(("device", launch.device) if config.replica_gpus is None else ("replica_gpus", launch.gpus)),
        ),
        ("CPU", launch.cpus, "replica_cpus", launch.cpus),
    ):
        needed, found = each * config.least, there.get(kind, 0)
        if needed > found:
            rule = f"what this machine has room for: {config.least} replicas need {needed:g} {kind}s"
            raise SettingError(setting, value, rule, f"Ray finds {found:g} here")
