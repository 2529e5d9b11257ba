"""`twotower chat`: a conversation in the terminal, with a model in this process or a server's."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twotower.checkpoints.hf import resolve
from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.cli.conversation.answering import Answering, AnswerSettings
from twotower.cli.conversation.history import Conversation
from twotower.cli.conversation.remote import RemoteModel
from twotower.cli.conversation.session import ChatSession
from twotower.cli.options import (
    ContextDeviceOption,
    DenoiserDeviceOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    open_model,
)
from twotower.cli.settings import like, with_settings
from twotower.decoding.params import SamplingParams
from twotower.engine.config import MIB, EngineConfig
from twotower.model.two_tower import TwoTower

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("chat")
@with_settings
def command(
    context: typer.Context,
    model: ModelArgument = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(
            help="Chat with a server's model instead, at the address of its OpenAI API, such as "
            "http://127.0.0.1:8000/v1; MODEL is then what the server calls it, by default the first it lists.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key that a server wants.", show_default="none")
    ] = None,
    system: Annotated[
        str, typer.Option(help="System prompt, which begins the conversation.", show_default="none")
    ] = "",
    file: Annotated[
        Path | None,
        typer.Option("--load", exists=True, dir_okay=False, help="Go on with a conversation that /save wrote."),
    ] = None,
    params: SamplingParams,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    context_device: ContextDeviceOption = None,
    denoiser_device: DenoiserDeviceOption = None,
    state_mib: Annotated[int | None, like(EngineConfig, "state_bytes")] = None,
) -> None:
    """Chat in the terminal; the block in progress is drawn while the denoiser fills it.

    /help lists the commands, such as /mode, /set, /retry and /save. Ctrl-C ends an answer, Ctrl-D the chat. Without a
    terminal every line of stdin is a message or a command, and stdout has only answers.
    """
    conversation = Conversation() if file is None else Conversation.load(file)
    conversation.system = system or conversation.system
    sources = {name: context.get_parameter_source(name) for name in SamplingParams.__dataclass_fields__}
    chosen = frozenset(name for name, source in sources.items() if source is not None and source.name != "DEFAULT")
    answering: Answering
    if url is None:
        opened = open_model(
            model, device=device, dtype=dtype, context_device=context_device, denoiser_device=denoiser_device
        )
        answering = _local(model, opened, state_mib)
    else:
        answering = RemoteModel(url, model, api_key)
    session = ChatSession(answering, conversation, AnswerSettings(params, chosen), Console(), Console(stderr=True))
    session.show_loaded()
    session.run()


def _local(model: str | None, opened: TwoTower, state_mib: int | None) -> Answering:
    try:
        from twotower.cli.conversation.local import LocalModel
    except ModuleNotFoundError as error:
        raise ValueError(f"chat templates need the package {error.name}; pip install 'twotower[chat]'") from error
    folder = DEFAULT_CHECKPOINT if model is None else resolve(model)
    limits = EngineConfig(
        max_num_requests=1,
        state_bytes=None if state_mib is None else state_mib * MIB,
    )
    return LocalModel(opened, folder, model or folder.name, limits)
