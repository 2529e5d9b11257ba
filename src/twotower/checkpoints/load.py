"""Opening a checkpoint for inference."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from twotower.checkpoints.hf import SHIPPED, load_model, load_tokenizer, resolve
from twotower.model.two_tower import TwoTower
from twotower.ops.backend import Backend

DEFAULT_CHECKPOINT = SHIPPED["stories"]


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    context_device: str | torch.device | None = None,
    denoiser_device: str | torch.device | None = None,
    pack: bool = True,
    backend: Literal["reference", "native"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TwoTower:
    """Opens a two-tower checkpoint: a local directory, a hub id, or the name of one that comes with the package,
    "stories" (the default) or "hybrid".

    `dtype` None keeps the checkpoint's. The towers go to `context_device` and `denoiser_device`, each `device` unless
    given. `pack` gives constant weights the layout that is fastest for inference; pack=False keeps plain tensors, to
    change, train or save them. A packed model runs the `backend`'s ops: "reference" (PyTorch), "native" (C, on a CPU
    with a C compiler), or by default the fastest there is. `progress(done, total)` is called per tensor. Raises
    FileNotFoundError or ValueError naming the file or tensor at fault.
    """
    wanted = None if backend is None else _backend(backend)
    if wanted is not None and not pack:
        raise ValueError(f"backend is {backend!r} with pack=False, which always runs PyTorch; drop one of them")
    folder = DEFAULT_CHECKPOINT if path is None else resolve(path)
    model = load_model(
        folder,
        dtype=dtype,
        context_device=device if context_device is None else context_device,
        denoiser_device=device if denoiser_device is None else denoiser_device,
        progress=progress,
    )
    model.tokenizer = load_tokenizer(folder)
    if pack:
        model.pack_(wanted)
    return model.eval()


def _backend(name: str) -> Backend:
    if name not in [b.value for b in Backend]:
        raise ValueError(
            f"backend is {name!r}, must be one of {', '.join(b.value for b in Backend)}, or None to choose"
        )
    return Backend(name)
