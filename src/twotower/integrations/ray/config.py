"""What replicas are started from."""

import dataclasses
import math
import secrets
from pathlib import Path

from twotower.engine.config import EngineConfig
from twotower.engine.memory_plan import usual_fraction
from twotower.errors import SettingError
from twotower.options import check_options, option
from twotower.server.config import ServerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How many replicas there are and what of a machine each of them takes, checked once. Raises SettingError for a
    value that is not allowed."""

    replicas: int | None = option(
        None,
        "Serve with so many replicas under Ray, or with as many as work asks for from this number on.",
        least=1,
        shown_default="this process alone",
    )
    max_replicas: int | None = option(
        None, "Most replicas, of which those that have no work end.", least=1, shown_default="--replicas"
    )
    replica_cpus: float = option(1.0, "CPUs that each replica reserves and computes with.", above=0)
    replica_gpus: float | None = option(
        None,
        "GPUs that each replica reserves, which may be a part of one.",
        least=0,
        shown_default="those of --device",
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("max_replicas", "replica_gpus"):
            if self.replicas is None and getattr(self, name) is not None:
                raise SettingError(
                    name, getattr(self, name), "left out without --replicas", "give the least number, too"
                )
        if self.max_replicas is not None and self.max_replicas < self.least:
            raise SettingError("max_replicas", self.max_replicas, f"at least --replicas, {self.least}")

    @property
    def least(self) -> int:
        """The number of replicas that are always there."""
        return self.replicas or 1

    @property
    def most(self) -> int:
        """The number of replicas that may be there."""
        return self.max_replicas or self.least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """All that one replica is started from: the settings of `twotower serve`, with the text of a chat template that is
    not the checkpoint's in the place of its file, which only one machine may have.

    The `secret` is known to the replicas and the router alone: replicas answer nobody else.
    """

    model: str | None = None
    server: ServerConfig
    limits: EngineConfig
    device: str = "cpu"
    context_device: str | None = None
    denoiser_device: str | None = None
    dtype: str | None = None
    template: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    secret: str = dataclasses.field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def with_template(self, file: Path | None) -> "Launch":
        """The same with the chat template in a file, if there is one. Raises ValueError for one that can't be used."""
        if file is None:
            return self
        from twotower.checkpoints.chat_template import ChatTemplate

        try:
            text = file.read_text(encoding="utf-8")
            ChatTemplate(text, {})
        except ValueError as error:
            raise ValueError(f"{file} can't be used: {error}") from error
        return dataclasses.replace(self, template=text)

    @property
    def num_gpus(self) -> int:
        """The GPUs that the devices name: `cuda` is one, `cuda:0` and `cuda:1` are two."""
        named = [self.device] if self.context_device is None or self.denoiser_device is None else []
        named += [name for name in (self.context_device, self.denoiser_device) if name is not None]
        numbers = [int(name.partition(":")[2] or 0) for name in named if name.partition(":")[0] == "cuda"]
        return max(numbers, default=-1) + 1

    def reserving(self, config: ReplicaConfig) -> "Launch":
        """The same with what each replica reserves.

        Where GPUs are asked for and no device is, the device is `cuda`. Raises SettingError where fewer are asked for
        than the devices name.
        """
        asked = config.replica_gpus
        launch = dataclasses.replace(self, device="cuda") if asked and self.num_gpus == 0 else self
        needed = launch.num_gpus
        if asked is not None and math.ceil(asked) < needed:
            rule = f"at least {needed}, the GPUs of the devices"
            raise SettingError("replica_gpus", asked, rule, "leave it out, or use other devices")
        return dataclasses.replace(launch, cpus=config.replica_cpus, gpus=float(needed) if asked is None else asked)

    def memory_fraction(self, num_cpus: int) -> float | None:
        """The share of a machine's free memory for states and keys, None where bytes are given.

        By default it is that of a single server times the replica's part of the GPU or of the machine's CPUs, for
        others may have the rest.
        """
        if self.limits.memory_fraction is not None or self.limits.state_bytes is not None:
            return self.limits.memory_fraction
        kind = (self.context_device or self.device).partition(":")[0]
        part = self.cpus / num_cpus if kind == "cpu" else self.gpus
        return usual_fraction(kind) * min(part or 1.0, 1.0)
