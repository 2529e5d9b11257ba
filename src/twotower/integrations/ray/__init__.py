"""Many replicas behind one address, on one machine or on a cluster of Ray's."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray import serve


def app(arguments: dict[str, Any]) -> "serve.Application":
    """The application that `serve run twotower.integrations.ray:app KEY=VALUE …` and configuration files of Ray Serve
    start.

    The arguments are those of `twotower serve`, by name or spelling, with `replicas` and `max_replicas` among them.
    Raises ValueError for one that is unknown, and SettingError for a value that is not allowed.
    """
    from twotower.integrations.ray.arguments import read
    from twotower.integrations.ray.deployments import behind_proxy

    return behind_proxy(*read(arguments))
