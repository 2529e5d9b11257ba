"""A two-tower model without weights: vLLM's first process checks requests against it, the denoiser begins with it."""

from pathlib import Path
from typing import Any

import torch

from twotower.checkpoints.hf.calibration_file import CALIBRATION_FILE, read_calibration
from twotower.checkpoints.hf.generation_file import read_config, read_sampling_defaults
from twotower.checkpoints.hf.tokenizer_file import load_tokenizer
from twotower.checkpoints.hf.two_towers import open_two_towers
from twotower.decoding.record import make_request
from twotower.decoding.step import Request
from twotower.errors import check_integer
from twotower.integrations.vllm.diffusion_params import diffusion_params
from twotower.integrations.vllm.shards import narrowed
from twotower.model.two_tower import TwoTower

# Most steps of a block: by a rule that may commit nothing in a step it takes all of them.
_MOST_STEPS = 256
# 256 places over a vocabulary of 131,072 tokens are 134 MB of logits, which no plan of vLLM's memory counts
_LARGEST_BLOCK = 256


def outline(
    folder: Path,
    dtype: torch.dtype,
    denoiser_device: str = "meta",
    *,
    num_devices: int = 1,
    is_compared: bool = False,
) -> TwoTower:
    """A model of a checkpoint's config with its tokenizer, sampling defaults and calibration. Its context tower has no
    weights, and those of its denoiser, on `denoiser_device`, are yet to be read: of `num_devices` what each has.

    Whether a calibration belongs to the weights takes a look at every tensor, which disks make a reading of all files.
    A worker does without (`is_compared`): no request reaches it that the first process, which looked, would refuse.
    """
    config = narrowed(read_config(folder), num_devices)
    model = TwoTower(config, dtype=dtype, context_device="meta", denoiser_device=denoiser_device).eval()
    model.tokenizer = load_tokenizer(folder, config.vocab_size)
    model.sampling = read_sampling_defaults(folder)
    if is_compared:
        model.calibration = read_calibration(folder, None)
    elif (folder / CALIBRATION_FILE).is_file():
        _, files = open_two_towers(folder)
        model.calibration = read_calibration(folder, files.stream(files.specs))
    return model


def request_of(model: TwoTower, params: Any, longest_text: int, *, prompt: tuple[int, ...] = (0,)) -> Request:
    """vLLM's sampling parameters as a request of `diffusion` after a prompt, in a server whose texts have at most
    `longest_text` tokens. Raises SettingError for what the model can't do."""
    room = max(longest_text - len(prompt), 1)
    ours = diffusion_params(params, min(params.max_tokens or room, room))
    if ours.block_size is not None:
        most = min(longest_text, max(_LARGEST_BLOCK, model.config.block_size))
        check_integer("block_size", ours.block_size, 1, most, "its logits must fit into memory")
    check_integer("steps_per_block", ours.steps_per_block, 1, _MOST_STEPS, "the rows beside it wait for the block")
    return make_request(model, prompt, ours)
