"""Two-tower checkpoint directories in the released layout: their tensors and order, reading and writing them."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import tokenizers
import torch

from twotower.checkpoints.hf.calibration_file import CALIBRATION_FILE, calibration_bytes, fingerprint
from twotower.checkpoints.hf.config_file import (
    CONFIG_FILE,
    config_bytes,
    stored_dtype,
    with_stored_dtype,
)
from twotower.checkpoints.hf.float_tensors import FloatTensors, open_floats
from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.tensor_files import TensorSpec, check_shapes, scan
from twotower.checkpoints.hf.tensor_writer import DEFAULT_SHARD_BYTES, write_tensors
from twotower.checkpoints.hf.tokenizer_file import TOKENIZER_FILE, replaced_files
from twotower.config import TwoTowerConfig
from twotower.model.one_tower import OneTower
from twotower.model.two_tower import TwoTower

# The released files' order of tensors, which decides what each shard holds.
_GROUPS = (
    "context_tower.",
    "context_lm_head.",
    "denoiser_tower.",
    "lm_head.",
    "t_embedder.",
    "t_block.",
    "scale_shift_tables.",
)
_CONTEXT = _GROUPS[:2]
_EMBEDDING = "context_tower.embeddings.weight"
_EXPERT_PARTS = (".mixer.experts.", ".mixer.gate.", ".mixer.shared_experts.")


def holds_two_towers(path_or_hub_id: str | Path) -> bool:
    """Whether it is a two-tower checkpoint, by the names of its tensors; a file is a single tower."""
    return not Path(path_or_hub_id).is_file() and _EMBEDDING in scan(resolve(path_or_hub_id)).specs


def released_shapes(config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the released layout, in the released order; allocates nothing."""
    with torch.device("meta"):
        tensors = TwoTower(config).released_tensors()
    return {name: tuple(tensors[name].shape) for name in sorted(tensors, key=_released_position)}


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    context_device: torch.device | str = "cpu",
    denoiser_device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TwoTower:
    """Loads a checkpoint directory or hub id, one tensor at a time: no more than the model is held in memory.

    `dtype` None is the config's `torch_dtype`, else that of the stored embedding. `progress` is called with the
    number of tensors loaded and their total. Raises ValueError or FileNotFoundError, naming tensors and files, before
    the model is allocated.
    """
    config, files = open_two_towers(path)
    if dtype is None:
        dtype = stored_dtype(config) or files.specs[_EMBEDDING].dtype
    model = TwoTower(config, dtype=dtype, context_device=context_device, denoiser_device=denoiser_device)
    parameters = model.released_tensors()
    with torch.no_grad():
        for done, (name, tensor) in enumerate(files.stream(files.specs), start=1):
            parameters[name].copy_(tensor)
            if progress is not None:
                progress(done, len(files.specs))
    return model


def load_denoiser_(
    model: TwoTower, path: str | Path, cut: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> None:
    """Fills the denoiser of a model whose context tower is elsewhere from a checkpoint directory or hub id, quantised
    weights as floats. For a model that is a part of the checkpoint's, `cut` makes of a named tensor what the part has.

    Raises ValueError or FileNotFoundError for a checkpoint that doesn't hold what its config asks for.
    """
    directory = resolve(path)
    config = read_config(directory)
    files = open_floats(directory, config.carried)
    shapes = {name: shape for name, shape in released_shapes(config).items() if not name.startswith(_CONTEXT)}
    there = {name: spec for name, spec in files.specs.items() if not name.startswith(_CONTEXT)}
    check_shapes(shapes, there, f"{path}, for its denoiser,")
    tensors = model.released_tensors()
    with torch.no_grad():
        for name, tensor in files.stream(shapes):
            tensors[name].copy_(tensor if cut is None else cut(name, tensor))


def released_stream(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint directory in the released order and its stored dtype, one at a time on the CPU.

    Raises what `load_model` raises.
    """
    _, files = open_two_towers(directory)
    yield from files.stream(files.specs)


def open_two_towers(path: str | Path) -> tuple[TwoTowerConfig, FloatTensors]:
    """The config, and the tensors in the released order, of which only the headers are read.

    Raises ValueError or FileNotFoundError for a directory that doesn't hold what its config asks for."""
    directory = resolve(path)
    if _EMBEDDING not in scan(directory).specs:
        raise ValueError(f"{path} holds a single tower; make two of it with: twotower init {path} OUT")
    config = read_config(directory)
    files = open_floats(directory, config.carried)
    shapes = released_shapes(config)
    check_shapes(shapes, files.specs, str(directory))
    return config, dataclasses.replace(files, specs={name: files.specs[name] for name in shapes})


def save(model: TwoTower, path: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Writes a checkpoint directory that `twotower.load`, and the released code, read back to the same model.

    Weights, config.json and, where the model has them, tokenizer.json and `documents` are replaced once all new files
    are complete. A model that `twotower.load` opened leaves no other file there that a checkpoint is read from, such as
    an old chat template; further files in `path` stay. A dtype that the config names becomes the model's. Weights above
    `max_shard_bytes` are split over several files. The model must be unpacked (`twotower.load(path, pack=False)`):
    packing rounds and reorders weights. A calibration is written with the weights that it was made for. Raises
    ValueError for a packed model.
    """
    tensors = model.released_tensors()
    specs = _specs(tensors)
    documents = {**(model.documents or {}), **_documents(model.config, specs[_EMBEDDING].dtype, model.tokenizer)}
    if model.calibration is not None and model.calibration.fingerprint == fingerprint(tensors.items()):
        documents = {CALIBRATION_FILE: calibration_bytes(model.calibration), **documents}
    replaced = [] if model.documents is None else replaced_files(Path(path))
    write_tensors(path, specs, tensors.items(), max_shard_bytes=max_shard_bytes, documents=documents, replaced=replaced)


def save_rounded(
    kind: type[TwoTower | OneTower],
    config: TwoTowerConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: str | Path,
    dtype: torch.dtype,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    documents: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the checkpoint directory of a model of `kind` and `dtype` from its released tensors, which come one at a
    time: two towers, or one that `initialise.init` reads.

    `tensors` may have any dtype and are rounded to `dtype`; parameters that a model of `dtype` keeps in float32 become
    float32. `documents` are further files, name -> content.
    """
    with torch.device("meta"):
        specs = _specs(kind(config, dtype=dtype).released_tensors())
    rounded = ((name, tensor.to(specs[name].dtype)) for name, tensor in tensors)
    whole = {**(documents or {}), **_documents(config, dtype, tokenizer)}
    write_tensors(path, specs, rounded, documents=whole, replaced=replaced_files(Path(path)))


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(tensors[n].dtype, tuple(tensors[n].shape)) for n in sorted(tensors, key=_released_position)}


def _documents(config: TwoTowerConfig, dtype: torch.dtype, tokenizer: tokenizers.Tokenizer | None) -> dict[str, bytes]:
    documents = {} if tokenizer is None else {TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode()}
    return documents | {CONFIG_FILE: config_bytes(with_stored_dtype(config, dtype))}


def _released_position(name: str) -> tuple[int, int, int]:
    """A sort key: tower, layer, part of an expert layer. Where it ties, the model's own order is the released one. The
    names of a single tower stay in the model's order."""
    group = next((i for i, prefix in enumerate(_GROUPS) if name.startswith(prefix)), 0)
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is None:
        return group, -1 if name.endswith("embeddings.weight") else 1 << 30, 0
    part = next((i for i, infix in enumerate(_EXPERT_PARTS, start=1) if infix in name), 0)
    return group, int(layer[1]), part
