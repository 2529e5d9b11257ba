"""Opening a checkpoint for inference."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from twotower.backends.choose import pack_
from twotower.checkpoints.hf.calibration_file import read_calibration
from twotower.checkpoints.hf.config_file import as_dtype
from twotower.checkpoints.hf.generation_file import read_sampling_defaults
from twotower.checkpoints.hf.hub import SHIPPED, resolve
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE, read_ngrams
from twotower.checkpoints.hf.tokenizer_file import carried_documents, load_tokenizer
from twotower.checkpoints.hf.two_towers import load_model
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower

DEFAULT_CHECKPOINT = SHIPPED["stories"]


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    context_device: str | torch.device | None = None,
    denoiser_device: str | torch.device | None = None,
    pack: bool = True,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TwoTower:
    """Opens a two-tower checkpoint: a local directory, a hub id, or the name of one that comes with the package,
    "stories" (the default) or "hybrid".

    `dtype`, such as "float32" or torch.float32, is what the weights are converted to; None keeps the checkpoint's.
    `device` holds both towers, unless `context_device` or `denoiser_device` places one elsewhere.

    `pack` gives the weights the layout in which the backend computes fastest; such a model can only be used, not
    trained, changed or saved, which pack=False allows. `backend` is what a packed model computes with: "reference"
    (PyTorch), "native" (C, on a CPU with a C compiler), or None for the fastest that is there; `model.backends` then
    says what runs each tower, and why. `progress(done, total)` is called after each tensor.

    The model is in evaluation mode and has the checkpoint's tokenizer as `tokenizer`, None if there is none, the
    sampling defaults of its generation_config.json, and the `calibration` of `twotower calibrate`, None if there is
    none; one that was made for other weights is named in a warning and ignored. Raises
    SettingError for a value that is not allowed, and FileNotFoundError or ValueError, naming the file or tensor, for a
    checkpoint that cannot be read.
    """
    if backend is not None and not pack:
        raise SettingError("backend", backend, "left out with pack=False, which always computes with PyTorch")
    dtype = None if dtype is None else as_dtype(dtype)
    device = _device("device", device)
    folder = DEFAULT_CHECKPOINT if path is None else resolve(path)
    model = load_model(
        folder,
        dtype=dtype,
        context_device=device if context_device is None else _device("context_device", context_device),
        denoiser_device=device if denoiser_device is None else _device("denoiser_device", denoiser_device),
        progress=progress,
    )
    model.tokenizer = load_tokenizer(folder, model.config.vocab_size)
    model.sampling = read_sampling_defaults(folder)
    model.ngrams = read_ngrams(folder, model.config, model.tokenizer)
    if model.ngrams is None and "ngram" in (model.sampling.drafter or ""):
        text = f"{folder} has lost its {NGRAMS_FILE}, which it drafts from; drafts come from the denoiser"
        warnings.warn(text, stacklevel=2)
        model.sampling = dataclasses.replace(model.sampling, drafter=None)
    model.calibration = read_calibration(folder, model.released_tensors().items())
    model.documents = carried_documents(folder)
    if pack:
        pack_(model, backend)
    return model.eval()


def _device(name: str, device: str | torch.device) -> torch.device:
    """The device, on which a tensor has been made to see that it is there."""
    try:
        return torch.empty(0, device=device).device
    # AssertionError is what a PyTorch without CUDA raises.
    except (RuntimeError, AssertionError) as error:
        rule = "a device of this machine that PyTorch can use, such as cpu or cuda:0"
        raise SettingError(name, str(device), rule, str(error).splitlines()[0]) from error
