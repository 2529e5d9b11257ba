"""Two-tower diffusion language models: a frozen autoregressive tower and a denoiser that fills blocks in parallel.

The public interface is what `__all__` names; anything in a deeper module may change without notice.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower.checkpoints.hf.two_towers import save
    from twotower.checkpoints.initialise import init
    from twotower.checkpoints.load import load
    from twotower.config import TwoTowerConfig
    from twotower.decoding.generate import generate, stream
    from twotower.decoding.output import BlockView, Generation, GenerationStats, StepOutput, Token
    from twotower.decoding.params import SamplingParams
    from twotower.decoding.scoring import Scores, score
    from twotower.engine.aio import AsyncEngine, Draining, EngineFailed, Overloaded, RequestFailed
    from twotower.engine.config import EngineConfig
    from twotower.engine.engine import Engine, EngineStats
    from twotower.errors import SettingError
    from twotower.model.state import ContextState
    from twotower.model.two_tower import TwoTower
    from twotower.rope import AttentionType, Rope
    from twotower.training.config import DenoisingConfig, TrainConfig
    from twotower.training.run.trainer import StepReport
    from twotower.training.train import train

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "AttentionType",
    "BlockView",
    "ContextState",
    "DenoisingConfig",
    "Draining",
    "Engine",
    "EngineConfig",
    "EngineFailed",
    "EngineStats",
    "Generation",
    "GenerationStats",
    "Overloaded",
    "RequestFailed",
    "Rope",
    "SamplingParams",
    "Scores",
    "SettingError",
    "StepOutput",
    "StepReport",
    "Token",
    "TrainConfig",
    "TwoTower",
    "TwoTowerConfig",
    "__version__",
    "generate",
    "init",
    "load",
    "save",
    "score",
    "stream",
    "train",
]

# Imported when first used: `twotower --help` imports this package too, and torch takes seconds.
_HOMES = {
    "AsyncEngine": "twotower.engine.aio",
    "AttentionType": "twotower.rope",
    "BlockView": "twotower.decoding.output",
    "ContextState": "twotower.model.state",
    "DenoisingConfig": "twotower.training.config",
    "Draining": "twotower.engine.aio",
    "Engine": "twotower.engine.engine",
    "EngineConfig": "twotower.engine.config",
    "EngineFailed": "twotower.engine.aio",
    "EngineStats": "twotower.engine.engine",
    "Generation": "twotower.decoding.output",
    "GenerationStats": "twotower.decoding.output",
    "Overloaded": "twotower.engine.aio",
    "RequestFailed": "twotower.engine.aio",
    "Rope": "twotower.rope",
    "SamplingParams": "twotower.decoding.params",
    "Scores": "twotower.decoding.scoring",
    "SettingError": "twotower.errors",
    "StepOutput": "twotower.decoding.output",
    "StepReport": "twotower.training.run.trainer",
    "Token": "twotower.decoding.output",
    "TrainConfig": "twotower.training.config",
    "TwoTower": "twotower.model.two_tower",
    "TwoTowerConfig": "twotower.config",
    "generate": "twotower.decoding.generate",
    "init": "twotower.checkpoints.initialise",
    "load": "twotower.checkpoints.load",
    "save": "twotower.checkpoints.hf.two_towers",
    "score": "twotower.decoding.scoring",
    "stream": "twotower.decoding.generate",
    "train": "twotower.training.train",
}


if not TYPE_CHECKING:  # a type checker that saw this function would accept any misspelt name

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
