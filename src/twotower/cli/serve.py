"""`twotower serve`: an HTTP server for OpenAI's clients, with every decoding mode behind one port."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from twotower.checkpoints.hf import resolve
from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.cli.options import (
    ContextDeviceOption,
    DenoiserDeviceOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    open_model,
)
from twotower.decoding.modes import Mode
from twotower.engine.aio import AsyncEngine
from twotower.engine.config import MIB, EngineConfig

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_ENGINE = EngineConfig()


@app.command("serve")
def command(
    model: ModelOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the model.", show_default="the checkpoint's directory or hub id"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    mode: Annotated[Mode, typer.Option(help="Mode of requests that name none.")] = "diffusion",
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="TWOTOWER_API_KEY", help="Key that requests must carry; several may be given.", show_default="none"
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a prompt and its answer.", show_default="the checkpoint's, or 4096"),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Most texts written at a time.")] = _ENGINE.max_num_requests,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Most texts that wait; what comes beyond is told to try later.")
    ] = _ENGINE.max_num_waiting,
    state_mib: Annotated[
        int, typer.Option(min=1, help="MiB for keys, values and states of all texts.")
    ] = _ENGINE.state_bytes // MIB,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web site whose pages may use the server; several may be given.", show_default="none"),
    ] = None,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, help="How long running requests may take to finish when the server is stopped.")
    ] = 30,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Least level of log lines.")
    ] = "info",
    device: DeviceOption = "cpu",
    context_device: ContextDeviceOption = None,
    denoiser_device: DenoiserDeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve OpenAI's completions and chat API, and a page at / that shows the modes at work.

    SIGTERM or Ctrl-C lets running requests finish.
    """
    try:
        from twotower.checkpoints.chat_template import ChatTemplate
        from twotower.server.app import make_app
        from twotower.server.config import ServerConfig
        from twotower.server.lifecycle import log_to_stderr, run
    except ModuleNotFoundError as error:
        raise ValueError(f"the server needs the package {error.name}; pip install 'twotower[serve]'") from error
    folder = DEFAULT_CHECKPOINT if model is None else resolve(model)
    opened = open_model(
        model, device=device, dtype=dtype, context_device=context_device, denoiser_device=denoiser_device
    )
    config = ServerConfig(
        model_name=name or _name(model, folder),
        host=host,
        port=port,
        default_mode=mode,
        max_context=max_context,
        api_keys=tuple(api_key or ()),
        cors_origins=tuple(cors_origin or ()),
        shutdown_seconds=shutdown_seconds,
        log_level=log_level,
    )
    limits = EngineConfig(max_num_requests=max_requests, max_num_waiting=max_waiting, state_bytes=state_mib * MIB)
    engine = AsyncEngine(opened, limits)
    server = make_app(engine, config, ChatTemplate.load(folder))
    log_to_stderr(config.log_level)
    run(server, engine, config)


def _name(model: str | None, folder: Path) -> str:
    if model is None:
        return "stories"
    return folder.resolve().name if Path(model).is_dir() else model
