"""What Ray Serve runs: replicas, and where its own proxies are in front, routers behind them."""

import asyncio
import contextlib
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Gauge
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from twotower.integrations.ray.choice import Fleet, Member
from twotower.integrations.ray.config import Launch, ReplicaConfig
from twotower.integrations.ray.replica import ReplicaServer
from twotower.integrations.ray.router import Look, Relay, make_router
from twotower.integrations.ray.trust import TakenId
from twotower.server.logs import log_to_stderr

_SECONDS_BETWEEN_CHECKS = 5
# Ray replaces a replica that three times in a row takes longer to say how it is; its own default is 30 seconds, for
# which requests would wait at one that hangs.
_SECONDS_TO_SAY = 10
# Between a server's own limit for running requests at its end and when Ray kills it
_SECONDS_TO_END = 10
_SECONDS_TO_LOOK = 5
# A router waits for replicas alone: it takes what comes.
_MAX_OF_ROUTER = 100_000
# The key of what replicas tell the policy of autoscaling
_TEXTS = "texts"


class Replica:
    """A server; Ray starts another in its place when its engine fails or its process dies."""

    def __init__(self, launch: Launch) -> None:
        self._server = ReplicaServer(launch, ray.util.get_node_ip_address())
        self._name = serve.get_replica_context().replica_id.unique_id
        self._gauges: dict[str, Gauge] = {}

    def member(self) -> Member | None:
        """Where it answers, None if it takes no more requests."""
        return self._server.member(self._name) if self._server.is_running else None

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has failed.

        Ray asks every few seconds, and its exporter gets the metrics of that moment.
        """
        self._export()
        if not self._server.engine.is_running:
            raise RuntimeError("the engine does not run")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The number of texts that the engine writes or has waiting, for `by_texts`."""
        return {_TEXTS: float(self._server.engine.num_unfinished)}

    async def __del__(self) -> None:
        await asyncio.to_thread(self._server.close)

    def _export(self) -> None:
        for family in text_string_to_metric_families(self._server.metrics.exposition().decode()):
            if family.type not in ("gauge", "counter") or not family.name.startswith("twotower_"):
                continue
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in self._gauges:
                    names = tuple(sample.labels)
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation or sample.name, names)
                self._gauges[sample.name].set(sample.value, sample.labels)


@serve.ingress()
class Router:
    """The router behind Ray's proxies, which give requests their ids."""

    def __init__(self, launch: Launch, replicas: DeploymentHandle) -> None:
        self._launch = launch
        self._replicas = replicas
        self._log = contextlib.ExitStack()
        self._log.enter_context(log_to_stderr(launch.server.log_level))

    def __del__(self) -> None:
        self._log.close()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        relay = Relay(Fleet(), self._launch.secret)
        return TakenId(make_router(relay, self._launch.server, looking(self._replicas)))


def looking(replicas: DeploymentHandle) -> Look:
    """What finds the replicas that take requests; it returns None if Ray can't say."""

    async def look() -> list[Member] | None:
        try:
            told = await replicas.broadcast("member").results_async(timeout_s=_SECONDS_TO_LOOK, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return None
        return [one for one in told if isinstance(one, Member)]

    return look


def by_texts(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ray's policy with the texts that the engines have in the place of the requests that Ray has forwarded, since
    routers forward requests themselves: as many replicas as have the wanted number of texts each."""
    texts = sum((context.aggregated_metrics or {}).get(_TEXTS, {}).values())
    return texts / context.config.get_target_ongoing_requests(), {}


def replicas_of(launch: Launch, config: ReplicaConfig) -> serve.Application:
    """The replicas alone. Raises SettingError for GPUs that don't fit the devices."""
    launch = launch.reserving(config)
    options: dict[str, Any] = {"num_replicas": config.least}
    if config.most > config.least:
        policy = AutoscalingPolicy(policy_function=by_texts)
        target = max(launch.limits.max_num_requests / 2, 1)
        scaling = AutoscalingConfig(
            min_replicas=config.least, max_replicas=config.most, target_ongoing_requests=target, policy=policy
        )
        options = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        **_common(launch),
        ray_actor_options={"num_cpus": launch.cpus, "num_gpus": launch.gpus},
        **options,
    )
    return deployment(Replica).bind(launch)


def behind_proxy(launch: Launch, config: ReplicaConfig) -> serve.Application:
    """The replicas behind a router, which Ray's proxies send requests to."""
    # It reserves no CPU, as Ray's own proxies don't.
    deployment = serve.deployment(
        **_common(launch), max_ongoing_requests=_MAX_OF_ROUTER, ray_actor_options={"num_cpus": 0}
    )
    return deployment(Router).bind(launch, replicas_of(launch, config))


def _common(launch: Launch) -> dict[str, Any]:
    return {
        "health_check_period_s": _SECONDS_BETWEEN_CHECKS,
        "health_check_timeout_s": _SECONDS_TO_SAY,
        "graceful_shutdown_timeout_s": launch.server.shutdown_seconds + _SECONDS_TO_END,
        "graceful_shutdown_wait_loop_s": 0.1,
        # Servers write a log of their own.
        "logging_config": LoggingConfig(enable_access_log=False),
    }
