"""Two-tower checkpoints in the released Hugging Face layout: config.json, safetensors files, tokenizer.json."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import tokenizers
import torch

from twotower.checkpoints.tensor_files import TensorFiles, TensorSpec, check_shapes, scan
from twotower.checkpoints.tensor_writer import DEFAULT_SHARD_BYTES, write_tensors
from twotower.config import TwoTowerConfig
from twotower.model.two_tower import TwoTower

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

# The checkpoints that come with the package, by the names under which they are opened.
SHIPPED = {name: Path(__file__).parents[1] / "data" / name for name in ("stories", "hybrid")}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_KEYS = ("torch_dtype", "dtype")

# The order of the released files' tensors, which decides what each shard holds.
_GROUPS = (
    "context_tower.",
    "context_lm_head.",
    "denoiser_tower.",
    "lm_head.",
    "t_embedder.",
    "t_block.",
    "scale_shift_tables.",
)
_EMBEDDING = "context_tower.embeddings.weight"
# Files beside the weights that a model made of this one takes along
_CARRIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_EXPERT_PARTS = (".mixer.experts.", ".mixer.gate.", ".mixer.shared_experts.")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint: the path itself, or of a name in `SHIPPED`, else a download from the hub.

    Only JSON, safetensors and chat template files are downloaded. Raises FileNotFoundError if it is neither.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file, must be a checkpoint directory; give the directory that holds it")
    if isinstance(path_or_hub_id, str) and path_or_hub_id in SHIPPED:  # Path("./hybrid") is a place
        return SHIPPED[path_or_hub_id]
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise FileNotFoundError(
            f"there is no directory {path}; give an existing one, a hub id such as owner/name, "
            f"or a shipped checkpoint: {', '.join(SHIPPED)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Only top-level files: repositories keep other formats' weights in folders.
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{path_or_hub_id} is neither a local directory nor a hub repository that can be downloaded ({error}); "
            "check the spelling, the connection and your access"
        ) from error


def holds_two_towers(path_or_hub_id: str | Path) -> bool:
    """Whether it is a two-tower checkpoint, by the names of its tensors; a file is a single tower."""
    return not Path(path_or_hub_id).is_file() and _EMBEDDING in scan(resolve(path_or_hub_id)).specs


def released_shapes(config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released layout and its shape, in the released order; allocates nothing."""
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
    """Loads a checkpoint directory or hub id, one tensor at a time: the model is all that is held in memory.

    `dtype` None is the config's `torch_dtype`, else that of the stored embedding. `progress` is called with the
    number of tensors loaded and their total. Raises ValueError or FileNotFoundError, naming tensors and files, before
    the model is allocated.
    """
    directory = resolve(path)
    if not holds_two_towers(directory):
        raise ValueError(f"{path} holds a single tower; make two of it with: twotower init {path} OUT")
    config = read_config(directory)
    files = released_files(directory, config)
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


def released_files(directory: Path, config: TwoTowerConfig) -> TensorFiles:
    """The tensors of a checkpoint directory in the released order, none of which is read. Raises ValueError where they
    aren't those of `config`."""
    files, shapes = scan(directory), released_shapes(config)
    check_shapes(shapes, files.specs, str(directory))
    return dataclasses.replace(files, specs={name: files.specs[name] for name in shapes})


def released_stream(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint directory in its stored dtype, one at a time. Raises what `load_model` does."""
    files = released_files(directory, read_config(directory))
    yield from files.stream(files.specs)


def carried_documents(directory: Path) -> dict[str, bytes]:
    """A checkpoint directory's chat template and settings of its tokenizer, by file name, where they are there."""
    return {name: (directory / name).read_bytes() for name in _CARRIED_FILES if (directory / name).exists()}


def load_tokenizer(path: str | Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a checkpoint directory or hub id; None if it has no tokenizer.json.

    It encodes whole texts: the truncation and padding that a file may keep from somebody's last call are dropped.
    """
    file = resolve(path) / TOKENIZER_FILE
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    # The library raises a bare Exception for a broken file; these are the ways in which a file is usually broken.
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or "vocab" not in raw["model"]:
        raise ValueError(f"{file} has no model with a vocabulary; download the repository's tokenizer.json again")
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save(
    model: TwoTower,
    path: str | Path,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a directory that `load_model`, and the released code, read back to the same model.

    Weights already there are replaced once all new files are complete; other files stay, tokenizer.json too if
    `tokenizer` is None. A dtype named by the config becomes the model's.
    """
    tensors = model.released_tensors()
    specs = _specs(tensors)
    documents = _documents(model.config, specs, tokenizer)
    write_tensors(path, specs, tensors.items(), max_shard_bytes=max_shard_bytes, documents=documents)


def save_rounded(
    config: TwoTowerConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: str | Path,
    dtype: torch.dtype,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    documents: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model of `dtype` as `save` does from released tensors of any dtype, which come one at a time, and
    further `documents` by file name; the parts that no model rounds are float32."""
    with torch.device("meta"):
        specs = _specs(TwoTower(config, dtype=dtype).released_tensors())
    rounded = ((name, tensor.to(specs[name].dtype)) for name, tensor in tensors)
    write_tensors(path, specs, rounded, documents={**(documents or {}), **_documents(config, specs, tokenizer)})


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(tensors[n].dtype, tuple(tensors[n].shape)) for n in sorted(tensors, key=_released_position)}


def _documents(
    config: TwoTowerConfig, specs: Mapping[str, TensorSpec], tokenizer: tokenizers.Tokenizer | None
) -> dict[str, bytes]:
    documents = {} if tokenizer is None else {TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode()}
    named = with_stored_dtype(config, specs[_EMBEDDING].dtype)
    return documents | {CONFIG_FILE: config_bytes(named)}


def read_config(directory: Path) -> TwoTowerConfig:
    """The directory's config.json. Raises FileNotFoundError without one."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}; download it, or finish the interrupted write")
    return TwoTowerConfig.from_json(file)


def config_bytes(config: TwoTowerConfig) -> bytes:
    """What `TwoTowerConfig.to_json` writes, for a file that is put in place with others."""
    return json.dumps(config.to_dict(), indent=1).encode()


def stored_dtype(config: TwoTowerConfig) -> torch.dtype | None:
    """The dtype that the config names, or None."""
    for key in _DTYPE_KEYS:
        name = config.carried.get(key)
        if name is not None:
            if name not in _DTYPES:
                raise ValueError(f"{key} is {name!r} in {CONFIG_FILE}, must be one of {sorted(_DTYPES)}; correct it")
            return _DTYPES[name]
    return None


def with_stored_dtype(config: TwoTowerConfig, dtype: torch.dtype) -> TwoTowerConfig:
    """The config with the dtype it names, if any, replaced by `dtype`."""
    name = str(dtype).removeprefix("torch.")
    named = {key: name for key in _DTYPE_KEYS if key in config.carried}
    return dataclasses.replace(config, carried={**config.carried, **named})


def _released_position(name: str) -> tuple[int, int, int]:
    """Sorts, stably, by tower, layer and part of an expert layer; elsewhere the model's own order is the released."""
    group = next(i for i, prefix in enumerate(_GROUPS) if name.startswith(prefix))
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is None:
        return group, -1 if name.endswith("embeddings.weight") else 1 << 30, 0
    part = next((i for i, infix in enumerate(_EXPERT_PARTS, start=1) if infix in name), 0)
    return group, int(layer[1]), part
