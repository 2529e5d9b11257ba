"""Where a measurement comes from: its command, commit and machine."""

from typing import Any

import torch

from twotower.model.two_tower import TwoTower
from twotower.origin import command, commit, cpu_model


def provenance(model: TwoTower) -> dict[str, Any]:
    """What is published with every measurement.

    `commit` is None unless the package is in its git checkout. `machine` includes the number of PyTorch's threads.
    """
    return {
        "command": command(),
        "commit": commit(),
        "machine": machine(model),
        "torch": torch.__version__,
        "dtype": str(model.context_tower.embeddings.dtype).removeprefix("torch."),
    }


def machine(model: TwoTower) -> dict[str, Any]:
    """The processor's name, the number of threads used, and the GPU's name if the model is on one."""
    found: dict[str, Any] = {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    if model.context_device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(model.context_device)
    return found
