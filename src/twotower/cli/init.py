"""`twotower init`: a two-tower checkpoint from a single-tower model, or from another with a longer denoiser."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twotower.checkpoints.initialise import init
from twotower.cli.options import Dtype, check_out
from twotower.training.run.lock import locked

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("init")
def command(
    backbone: Annotated[
        str,
        typer.Argument(
            help="Directory or Hugging Face id of a model of a family in docs/families.md; a GGUF or llama2.c file; "
            "or, with --denoiser-layers, a checkpoint of two towers, whose denoiser is cut."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write; weights already there are replaced.")],
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Block length the denoiser is to be trained at, 1 or more.", show_default="16, or the checkpoint's"
        ),
    ] = None,
    denoiser_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that the denoiser has: all, or indices such as 0,1,10,11, or first:K, spread:K or last:K, "
            "which count layers that read the context, each with the MLPs or experts behind it.",
            show_default="all",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the written weights.", show_default="each tensor's own")
    ] = None,
    mask_token_id: Annotated[
        int | None,
        typer.Option(
            help="Token that stands for a mask, 0 to the vocabulary's last.",
            show_default="the one the family keeps free, else a new one",
        ),
    ] = None,
    keep_tokens: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON file with a list of token ids: the vocabulary is cut down to them, its control and byte tokens.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds the time embedder, the only random part; 0 to 2^63 - 1.")] = 0,
) -> None:
    """Make a two-tower checkpoint whose towers both start as a single-tower model, or cut the denoiser of one."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, must be 0 to {2**63 - 1}; the default is 0")
    check_out(out)
    with locked(out), Console(stderr=True).status(f"Writing {out}"):
        init(
            backbone,
            out,
            dtype=dtype,
            mask_token_id=mask_token_id,
            block_size=block_size,
            keep_tokens=None if keep_tokens is None else _token_ids(keep_tokens),
            denoiser_layers=denoiser_layers,
            seed=seed,
        )
    print(f"wrote {out}; make a corpus to train it on with: twotower tokenize {out} TEXT CORPUS")


def _token_ids(file: Path) -> list[int]:
    try:
        ids = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); write a list of token ids, such as [0, 1, 2]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{file} must hold a JSON list of token ids, such as [0, 1, 2]")
    return ids
