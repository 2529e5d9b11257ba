"""`twotower serve`: an HTTP server for OpenAI's and Anthropic's clients, with every decoding mode behind one port."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from twotower.checkpoints.hf import resolve
from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.cli.options import (
    ContextDeviceOption,
    DenoiserDeviceOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    open_model,
)
from twotower.cli.recipe import RecipeOption
from twotower.cli.settings import with_settings
from twotower.cli.start_table import plan_for, print_plan, show_memory
from twotower.engine.aio import AsyncEngine, EngineFailed
from twotower.engine.config import EngineConfig
from twotower.errors import SettingError
from twotower.integrations.ray.config import Launch, ReplicaConfig
from twotower.server.config import ServerConfig, read_keys, served_name
from twotower.signals import end_at_once, on_signals


class _Placement(TypedDict):
    """The options that say where the towers run, and in which dtype."""

    device: str
    context_device: str | None
    denoiser_device: str | None
    dtype: Dtype | None


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("serve")
@with_settings
def command(
    *,
    context: typer.Context,
    model: ModelArgument = None,
    named_model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="The model, as an option.", show_default=False)
    ] = None,
    config: ServerConfig,
    limits: EngineConfig,
    replicas: ReplicaConfig,
    device: DeviceOption = "cpu",
    context_device: ContextDeviceOption = None,
    denoiser_device: DenoiserDeviceOption = None,
    dtype: DtypeOption = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File with more API keys, one on each line.", show_default="none"
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File with the jinja template of chats.", show_default="the checkpoint's"
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what the memory would be used for: a table, or JSON where stdout is no terminal.",
        ),
    ] = False,
    device_memory: Annotated[
        float | None,
        typer.Option(help="With --dry-run: GB that each device has.", show_default="what is free here"),
    ] = None,
    recipe: RecipeOption = None,
) -> None:
    """Serve OpenAI's and Anthropic's APIs, and a page at / that shows the modes at work.

    SIGTERM, SIGHUP or Ctrl-C lets running requests finish, and a second one ends the server at once. With --replicas,
    Ray runs several servers behind this address.
    """
    source = context.get_parameter_source("model")
    if named_model is not None and source is not None and source.name == "COMMANDLINE":
        raise SettingError("--model", named_model, f"left out beside the model {model!r}")
    model = named_model or model  # of which the second may be a recipe's
    try:
        from twotower.checkpoints.chat_template import ChatTemplate
        from twotower.server.lifecycle import Loaded, of_engine, run
        from twotower.server.logs import log_to_stderr
        from twotower.server.startup import check_certificate, listen
    except ModuleNotFoundError as error:
        raise ValueError(f"the server needs the package {error.name}; pip install 'twotower[serve]'") from error
    if api_key_file is not None:
        config = dataclasses.replace(config, api_keys=config.api_keys + read_keys(api_key_file))
    check_certificate(config)
    config = dataclasses.replace(config, model_names=config.model_names or (served_name(model),))
    limits = dataclasses.replace(limits, max_context=config.max_context)
    where: _Placement = {
        "device": device,
        "context_device": context_device,
        "denoiser_device": denoiser_device,
        "dtype": dtype,
    }
    if dry_run:
        folder = DEFAULT_CHECKPOINT if model is None else resolve(model)
        print_plan(plan_for(folder, limits, **where, gigabytes=device_memory))
        return
    if device_memory is not None:
        raise SettingError("--device-memory", device_memory, "left out without --dry-run")
    if replicas.replicas is not None:
        launch = Launch(model=model, server=config, limits=limits, **where)
        _serve_replicas(launch.with_template(chat_template), replicas)
        return

    def load() -> Loaded:
        folder = DEFAULT_CHECKPOINT if model is None else resolve(model)
        template = ChatTemplate.load(folder, chat_template)
        engine = AsyncEngine(open_model(model, **where), limits)
        show_memory(engine.plan)
        return of_engine(engine, config, template)

    with on_signals(end_at_once), log_to_stderr(config.log_level):
        try:
            run(load, config, listen(config))
        except EngineFailed:
            raise typer.Exit(1) from None  # the log has said why


def _serve_replicas(launch: Launch, replicas: ReplicaConfig) -> None:
    from twotower.server.logs import log_to_stderr

    # Ray reads them when it is imported: it would merge log lines that differ in numbers alone, and colour them.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        from twotower.integrations.ray.run import run_replicas
    except ModuleNotFoundError as error:
        raise ValueError(f"replicas need the package {error.name}; pip install 'twotower[ray]'") from error
    with on_signals(end_at_once), log_to_stderr(launch.server.log_level):
        run_replicas(launch, replicas)
