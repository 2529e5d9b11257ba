"""Finding the architecture of a GGUF file by llama.cpp's name of it."""

from collections.abc import Mapping

from twotower.checkpoints.gguf.architecture import Architecture
from twotower.checkpoints.gguf.dense import DENSE
from twotower.checkpoints.gguf.hybrids import BAMBA, HYBRIDS, is_bamba
from twotower.checkpoints.gguf.mixtures import MIXTURES
from twotower.checkpoints.gguf.reader import GgufFile, shown
from twotower.checkpoints.gguf.selective import SELECTIVE

_ARCHITECTURES: Mapping[str, Architecture] = {**DENSE, **MIXTURES, **HYBRIDS, **SELECTIVE}


def find_architecture(file: GgufFile) -> Architecture:
    """The architecture of a file; raises ValueError, naming those that are, for one that is not declared."""
    found = _ARCHITECTURES.get(file.architecture)
    if found is None:
        raise ValueError(
            f"{file.path} has the architecture {shown(file.architecture)}, must be one of "
            f"{', '.join(sorted(_ARCHITECTURES))}; take the model's Hugging Face folder instead"
        )
    # Two families have the same name there.
    return BAMBA if file.architecture == "granitehybrid" and is_bamba(file) else found
