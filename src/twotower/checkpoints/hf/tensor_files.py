"""Reading the safetensors files of a checkpoint directory: their headers, and then tensors one at a time."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.checkpoints.hf.hub import refuse_pointer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The names of dtypes in safetensors headers, widest first, the order in which files store their tensors.
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Those of quantised weights, and of buffers that are no weights
_OTHER_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SHOWN = 5


class TensorSpec(NamedTuple):
    """The dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory's safetensors files, as their headers list them: name -> dtype and shape, and name ->
    file."""

    directory: Path
    specs: Mapping[str, TensorSpec]
    files: Mapping[str, Path]

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Reads the named tensors, file by file and one at a time, onto the CPU in their stored dtype.

        Tensors are mapped from the file and cost memory only while they are referenced.
        """
        for in_file in self.by_file({name: name for name in names}):
            with self.reader() as read:
                for name in in_file:
                    yield name, read(name)

    def by_file(self, names: Mapping[str, str]) -> list[list[str]]:
        """The keys of `names` whose tensors, the values, are in the same file."""
        found: dict[Path, list[str]] = {}
        for key, name in names.items():
            found.setdefault(self.files[name], []).append(key)
        return list(found.values())

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads the tensor of a name onto the CPU; files stay open until the context ends."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(name: str) -> Tensor:
                file = self.files[name]
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                return opened[file].get_tensor(name)

            yield read


def scan(directory: Path) -> TensorFiles:
    """Reads the headers of `model.safetensors`, or of the shards that the directory's index names.

    Raises FileNotFoundError for a missing file, and ValueError for one that is broken, disagrees with the index, holds
    a tensor that another file holds too, or stores an unknown dtype. Pickled weights are never opened, and an adapter,
    which changes weights that it does not hold, is refused.
    """
    adapter = next((name for name in _ADAPTER if (directory / name).exists()), None)
    if adapter is not None:
        raise ValueError(
            f"{directory} holds an adapter ({adapter}), which changes another model's weights; merge both into a whole "
            "model with the tool that made it, such as peft's merge_and_unload()"
        )
    index = _read_index(directory)
    names = {SINGLE_FILE} if index is None else set(index.values())
    missing = sorted(n for n in names if not (directory / n).is_file())
    if missing and index is None:
        raise FileNotFoundError(_no_weights(directory))
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {_some(missing)}, named by {INDEX_FILE}; download the missing files"
        )
    specs: dict[str, TensorSpec] = {}
    files: dict[str, Path] = {}
    for file in sorted(directory / n for n in names):
        for name, spec in _read_header(file).items():
            if name in files:
                raise ValueError(f"tensor {name} is in both {files[name]} and {file}; delete the file that is stale")
            specs[name], files[name] = spec, file
    if index is not None:
        astray = [n for n in index if n not in files or files[n].name != index[n]]
        extra = [n for n in files if n not in index]
        if astray or extra:
            found = [f"{_some(astray)} not in the file it names"] if astray else []
            found += [f"{_some(extra)} in the files but not in the index"] if extra else []
            raise ValueError(
                f"{directory / INDEX_FILE} disagrees with the files: {'; '.join(found)}; download the index and the "
                "files again, together"
            )
    return TensorFiles(directory, specs, files)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorSpec], where: str) -> None:
    """Raises one ValueError that names the missing, the unexpected and the misshapen tensors of the model `where`, by
    the shapes `expected` of its config."""
    wrong = [
        f"{name} is {tuple(found[name].shape)}, must be {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems = {
        "missing": [n for n in expected if n not in found],
        "unexpected": [n for n in found if n not in expected],
        "of the wrong shape": wrong,
    }
    text = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
    if text:
        raise ValueError(f"the tensors of {where} do not fit its config ({text}); both must come from one checkpoint")


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name, or None if the directory has no index."""
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; download it again") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensor names to files; download it again")
    # A name such as ../../x would read outside the checkpoint.
    strange = [str(n) for n in weight_map.values() if not isinstance(n, str) or Path(n).name != n]
    if strange:
        raise ValueError(f"{path} names {_some(strange)}, must be plain file names; download it again")
    if (directory / SINGLE_FILE).exists() and SINGLE_FILE not in weight_map.values():
        if all((directory / name).is_file() for name in weight_map.values()):
            raise ValueError(f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}; delete the one that is stale")
        return None  # left behind by weights that were in several files
    return weight_map


def _read_header(file: Path) -> dict[str, TensorSpec]:
    known = STORED_DTYPES | _OTHER_DTYPES
    specs = {}
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            for name in names:
                part = opened.get_slice(name)
                dtype = known.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"tensor {name} of {file} is {part.get_dtype()}, must be one of {list(known)}")
                specs[name] = TensorSpec(dtype, tuple(part.get_shape()))
    except SafetensorError as error:
        refuse_pointer(file)
        raise ValueError(f"{file} is not a complete safetensors file ({error}); download it again") from error
    return specs


def _no_weights(directory: Path) -> str:
    pickled = sorted(p.name for pattern in _PICKLED for p in directory.glob(pattern))
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if any(name.startswith("consolidated") for name in others):
        return (
            f"{directory} holds its weights only in Mistral's form ({_some(others)}); download model.safetensors or "
            f"{INDEX_FILE} and its files from the same repository, or another that has them"
        )
    if others:
        return (
            f"{directory} holds {_some(others)}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which says what is in "
            f"which file; download the index, or rename a single file to {SINGLE_FILE}"
        )
    if pickled:
        return (
            f"{directory} holds its weights only as pickles ({_some(pickled)}), which can run code and are not opened; "
            f'use a safetensors release, or, if you trust them, convert them with: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    return f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; download the weights into it"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
