"""Two-tower diffusion language models: a frozen autoregressive tower and a denoiser that fills blocks in parallel."""

from twotower.checkpoints.load import load
from twotower.config import TwoTowerConfig
from twotower.decoding.generate import Piece, generate, stream
from twotower.decoding.params import Generation, GenerationStats, SamplingParams
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower

__all__ = [
    "ContextState",
    "Generation",
    "GenerationStats",
    "Piece",
    "SamplingParams",
    "TwoTower",
    "TwoTowerConfig",
    "generate",
    "load",
    "stream",
]
