"""The weights of a checkpoint directory as floats: quantised ones are dequantised when they are read."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.hf.config_file import read_object
from twotower.checkpoints.hf.dequantise import awq, blocks_of_e2m1, gptq, packed_e2m1, packed_integers, scaled
from twotower.checkpoints.hf.tensor_files import STORED_DTYPES, TensorFiles, TensorSpec, scan

# The methods of config.json's quantization_config that are read. Which of them stored a weight shows in its parts.
_READ_METHODS = ("awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8")
_READ_FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)
# The forms and numbers of bits of these methods that are read
_READ_KINDS = {"awq": (("", "gemm"), (4,)), "gptq": (("", "gptq", "gptq_v2"), (2, 4, 8))}
# What follows a weight's name in the names of the tensors that it is stored as.
_PARTS = (
    "",
    "_packed",
    "_blocks",
    "_scale",
    "_scale_inv",
    "_scale_2",
    "_scales",
    "_global_scale",
    "_shape",
    "_zero_point",
    "_g_idx",
)
# What GPTQ and AWQ have in place of "weight"
_PACKED_COLUMNS, _COLUMN_ZEROS, _COLUMN_SCALES, _COLUMN_GROUPS = "qweight", "qzeros", "scales", "g_idx"
_FLOATS_OF_8_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_QUANTISED = (*_FLOATS_OF_8_BITS, torch.int8, torch.uint8, torch.int32)
_FLOATS = tuple(STORED_DTYPES.values())
# What the embedding and the head are called, before ".weight"
_EMBEDDINGS = ("embed_tokens", "embeddings", "wte", "embed_in")
_HEADS = ("lm_head", "embed_out")
# The last part of the names of floats that are no weights: ranges of activations and of caches' entries, which only
# quantised computing reads, and constants that follow from the config.
_NO_WEIGHTS = (
    "activation_scale",
    "input_global_scale",
    "input_scale",
    "input_scale_ub",
    "inv_freq",
    "k_scale",
    "kv_scale",
    "masked_bias",
    "output_scale",
    "prob_output_scale",
    "q_scale",
    "v_scale",
)


@dataclasses.dataclass(frozen=True)
class FloatTensors:
    """The weights of a directory under the names of a model that is not quantised.

    `specs` has each one's shape and the dtype that it has in such a model. `parts` are the stored tensors of quantised
    weights: weight -> part -> name. `settings` are those of the quantisation.
    """

    files: TensorFiles
    specs: Mapping[str, TensorSpec]
    parts: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, Any]

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Reads the named weights, file by file and one at a time, onto the CPU: in their stored dtype, quantised ones
        in float32. Raises ValueError for parts that don't fit each other."""
        names = list(names)
        yield from self.files.stream(name for name in names if name not in self.parts)
        firsts = {name: next(iter(self.parts[name].values())) for name in names if name in self.parts}
        for in_file in self.files.by_file(firsts):
            with self.files.reader() as read:
                for name in in_file:
                    parts = {part: read(stored) for part, stored in self.parts[name].items()}
                    try:
                        yield name, _weight(parts, self.settings)
                    except ValueError as error:
                        raise ValueError(f"tensor {name} of {self.files.directory}: {error}") from error


def open_floats(directory: Path, raw: Mapping[str, Any]) -> FloatTensors:
    """The weights of a directory whose config.json is `raw`, of which only headers are read.

    Buffers are left out: integers that belong to no weight, and ranges of activations. Raises what `scan` raises, and
    ValueError for a form of quantisation that is not read, naming it.
    """
    settings = _quantisation(directory, raw)
    files = scan(directory)
    parts = _parts(files.specs, settings)
    taken = {stored for of_weight in parts.values() for stored in of_weight.values()}
    dtype = STORED_DTYPES["BF16"]
    for key in ("torch_dtype", "dtype"):
        dtype = {str(d).removeprefix("torch."): d for d in _FLOATS}.get(str(raw.get(key)), dtype)
    unscaled = [name for name, spec in files.specs.items() if spec.dtype in _FLOATS_OF_8_BITS and name not in taken]
    if unscaled and settings:
        raise ValueError(f"tensor {unscaled[0]} of {directory} has no scale; download the model again")
    parts |= {name: {"": name} for name in unscaled}
    specs = {
        name: spec
        for name, spec in files.specs.items()
        if spec.dtype in _FLOATS and name not in taken and name.rpartition(".")[2] not in _NO_WEIGHTS
    }
    with files.reader() as read:
        for name, of_weight in parts.items():
            shape = _shape({part: files.specs[stored] for part, stored in of_weight.items()}, settings)
            if "_shape" in of_weight:
                shape = tuple(read(of_weight["_shape"]).tolist())
            specs[name] = TensorSpec(dtype, shape)
    return FloatTensors(files, specs, parts, settings)


def _settings_beside(directory: Path) -> dict[str, Any]:
    """The settings in the files that GPTQ's and AWQ's tools wrote before config.json had a place for them."""
    gptq, awq = (read_object(directory / name) for name in ("quantize_config.json", "quant_config.json"))
    if gptq:
        return gptq | {"quant_method": gptq.get("quant_method", "gptq")}
    return awq and awq | {"quant_method": "awq"}


def has_own_head(floats: FloatTensors) -> bool:
    """Whether a head is stored that differs from the embedding. As in transformers, the two are then not one tensor,
    whatever the config says."""
    last = {name.removesuffix(".weight").rpartition(".")[2]: name for name in floats.specs if name.endswith(".weight")}
    pair = [next((last[end] for end in ends if end in last), None) for ends in (_EMBEDDINGS, _HEADS)]
    stored = [name for name in pair if name is not None]
    if len(stored) < 2 or floats.specs[stored[0]].shape != floats.specs[stored[1]].shape:
        return False
    first, second = (tensor for _, tensor in floats.stream(stored))
    return not torch.equal(first, second)


def _quantisation(directory: Path, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's quantization_config, empty without one. Raises ValueError for a method that is not read."""
    settings = raw.get("quantization_config") or raw.get("compression_config") or _settings_beside(directory)
    method, form = settings.get("quant_method"), settings.get("format")
    if settings and "config_groups" in settings and method in (None, "sparseml"):
        method = "compressed-tensors"
    if settings and method not in _READ_METHODS:
        raise ValueError(
            f"{directory} is quantised by {method}, which is not read; take the model it was made from, or one that "
            f"is quantised by {', '.join(_READ_METHODS)}"
        )
    if method == "compressed-tensors" and form not in (None, *_READ_FORMATS):
        raise ValueError(
            f"{directory} is stored in compressed-tensors' format {form}, which is not read; take the model it was "
            f"made from, or one in {', '.join(_READ_FORMATS)}"
        )
    if method in _READ_KINDS:
        kind = str(settings.get("version", settings.get("checkpoint_format", ""))).lower()
        bits = settings.get("bits", settings.get("w_bit"))
        kinds, widths = _READ_KINDS[method]
        if kind not in kinds or bits not in widths:
            raise ValueError(
                f"{directory} is quantised by {method}, {bits!r} bits, form {kind!r}; read are {widths} bits, forms "
                f"{kinds}: take another model"
            )
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or (settings.get("transform_config") or {}).get("config_groups"):
        what = f"sparse weights in the format {sparse}" if sparse != "dense" else "weights that are transformed"
        raise ValueError(f"{directory} has {what}, which are not read; take the model that it was made from")
    return settings


def _parts(specs: Mapping[str, TensorSpec], settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The quantised weights among the stored tensors: weight -> part -> stored name."""
    found: dict[str, dict[str, str]] = {}
    for name, spec in specs.items():
        layer, _, last = name.rpartition(".")
        if last == _PACKED_COLUMNS:
            if settings.get("quant_method") not in _READ_KINDS:
                raise ValueError(f"config.json does not say how {name} is quantised; download the model again")
            parts = (_PACKED_COLUMNS, _COLUMN_ZEROS, _COLUMN_SCALES, _COLUMN_GROUPS)
            there = {part: f"{layer}.{part}" for part in parts if f"{layer}.{part}" in specs}
            lacking = {*parts[:-1]} - there.keys()
            if lacking:
                raise ValueError(f"the tensor {layer}.{sorted(lacking)[0]} is missing; download the model again")
            found[f"{layer}.weight"] = there
            continue
        weight = name.removesuffix("_packed").removesuffix("_blocks")
        scales = ("_scales",) if name.endswith("_blocks") else ("_scale", "_scale_inv")
        if spec.dtype in _QUANTISED and any(weight + scale in specs for scale in scales):
            found[weight] = {part: weight + part for part in _PARTS if weight + part in specs}
    return found


def _shape(parts: Mapping[str, TensorSpec], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The weight's shape, by those of its parts."""
    if _PACKED_COLUMNS in parts:
        per_word = 32 // _bits(settings) if _is_gptq(settings) else 1
        return parts[_COLUMN_SCALES].shape[1], parts[_PACKED_COLUMNS].shape[0] * per_word
    if "_blocks" in parts:
        experts, rows, groups, half = parts["_blocks"].shape
        return experts, groups * half * 2, rows
    dtype, (*leading, columns) = parts["_packed" if "_packed" in parts else ""]
    return (*leading, columns * 2 if dtype == torch.uint8 else columns)


def _is_gptq(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("quant_method") == "gptq")


def _bits(settings: Mapping[str, Any]) -> int:
    return int(settings["bits"])


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The one size of blocks that the settings name."""
    groups = (settings.get("config_groups") or {}).values()
    named = [settings.get("weight_block_size")]
    named += [(group.get("weights") or {}).get("block_structure") for group in groups if isinstance(group, dict)]
    sizes = {tuple(size) for size in named if isinstance(size, list) and len(size) == 2}
    return sizes.pop() if len(sizes) == 1 else None


def _weight(parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """The weight in float32."""
    if _PACKED_COLUMNS in parts:
        packed, zero_point, scale = (parts[part] for part in (_PACKED_COLUMNS, _COLUMN_ZEROS, _COLUMN_SCALES))
        if not _is_gptq(settings):
            return awq(packed, zero_point, scale)
        shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        return gptq(packed, zero_point, scale, _bits(settings), shift=shift, groups=parts.get(_COLUMN_GROUPS))
    if len(parts) == 1:
        return parts[""].float()
    if "_blocks" in parts:
        return blocks_of_e2m1(parts["_blocks"], parts["_scales"])
    scale = parts["_scale"] if "_scale" in parts else parts["_scale_inv"]
    if "_packed" in parts and parts["_packed"].dtype == torch.uint8:
        return packed_e2m1(parts["_packed"], scale, over=parts.get("_global_scale"))
    if "_packed" in parts:
        rows, columns = parts["_shape"].tolist()
        return packed_integers(parts["_packed"], scale, (rows, columns), parts.get("_zero_point"), parts.get("_g_idx"))
    if parts[""].dtype == torch.uint8:
        return packed_e2m1(parts[""], scale, times=parts.get("_scale_2"))
    return scaled(parts[""], scale, _block(settings), parts.get("_zero_point"))
