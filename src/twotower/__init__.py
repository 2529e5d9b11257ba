"""Two-tower diffusion language models: a frozen autoregressive tower and a denoiser that fills blocks in parallel."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower.checkpoints.load import load
    from twotower.config import TwoTowerConfig
    from twotower.decoding.generate import generate, stream
    from twotower.decoding.output import Generation, GenerationStats, StepOutput
    from twotower.decoding.params import SamplingParams
    from twotower.engine.aio import AsyncEngine
    from twotower.engine.config import EngineConfig
    from twotower.engine.engine import Engine
    from twotower.model.state import ContextState
    from twotower.model.two_tower import TwoTower

__all__ = [
    "AsyncEngine",
    "ContextState",
    "Engine",
    "EngineConfig",
    "Generation",
    "GenerationStats",
    "SamplingParams",
    "StepOutput",
    "TwoTower",
    "TwoTowerConfig",
    "generate",
    "load",
    "stream",
]

# Imported when first used: `twotower --help` imports this package too, and torch takes seconds.
_HOMES = {
    "AsyncEngine": "twotower.engine.aio",
    "ContextState": "twotower.model.state",
    "Engine": "twotower.engine.engine",
    "EngineConfig": "twotower.engine.config",
    "Generation": "twotower.decoding.output",
    "GenerationStats": "twotower.decoding.output",
    "SamplingParams": "twotower.decoding.params",
    "StepOutput": "twotower.decoding.output",
    "TwoTower": "twotower.model.two_tower",
    "TwoTowerConfig": "twotower.config",
    "generate": "twotower.decoding.generate",
    "load": "twotower.checkpoints.load",
    "stream": "twotower.decoding.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
