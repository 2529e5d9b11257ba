"""Runs several twotower servers behind one address with Ray Serve; see README.md."""

from ray import serve
from starlette.applications import Starlette

import twotower
from twotower.checkpoints.chat_template import ChatTemplate
from twotower.checkpoints.hf import resolve
from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.server.app import make_app
from twotower.server.config import ServerConfig


@serve.deployment(health_check_period_s=5)
@serve.ingress()
class Replica:
    """An engine with a whole server; Ray replaces it when the engine fails."""

    def __init__(self, model: str | None, name: str, max_context: int) -> None:
        self.folder = DEFAULT_CHECKPOINT if model is None else resolve(model)
        self.engine = twotower.AsyncEngine(twotower.load(self.folder)).start()
        self.config = ServerConfig(model_names=(name,), max_context=max_context)

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(self.engine, self.config, ChatTemplate.load(self.folder))

    def check_health(self) -> None:
        if not self.engine.is_running:
            raise RuntimeError("the engine does not run")


def app(arguments: dict[str, str]) -> serve.Application:
    """The application that `serve run` starts, with its key=value arguments; see README.md for them."""
    least, most = int(arguments.get("least", 1)), int(arguments.get("most", 4))
    texts = twotower.EngineConfig().max_num_requests
    deployment = Replica.options(
        ray_actor_options={"num_cpus": float(arguments.get("cpus", 1)), "num_gpus": float(arguments.get("gpus", 0))},
        # More requests than an engine runs at a time go to another replica, or wait until any has room
        max_ongoing_requests=texts,
        autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": texts / 2},
    )
    name, max_context = arguments.get("name", "stories"), int(arguments.get("max_context", 256))
    return deployment.bind(arguments.get("model"), name, max_context)
