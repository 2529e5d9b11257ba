"""Files of prompts, to token ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower.decoding.prompt import text_ids
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.text import read_records


def read_prompts(file: Path, model: TwoTower, folder: Path) -> list[list[int]]:
    """The prompts of a file: lines of a .txt, or records with a `prompt` or with chat `messages`, which the template of
    the checkpoint in `folder` renders, but for a last one of the assistant's. Raises ValueError, naming the place."""
    if model.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json to read prompts with; add one")
    prompts: list[list[int]] = []
    render: Callable[[Any, str], str] | None = None
    if file.suffix.lower() == ".txt":
        lines = [line for record in read_records(file) for line in record["text"].split("\n")]
        records = [{"prompt": line} for line in lines if line.strip()]
    else:
        records = list(read_records(file))
    for number, record in enumerate(records, 1):
        where = f"prompt {number} of {file}"
        if isinstance(record.get("prompt"), str):
            prompts.append([*text_ids(model, record["prompt"], where, special=True)])
        elif "messages" in record:
            render = render or _renderer(folder)
            # templates write the control tokens that a prompt begins with
            rendered = render(record, where)
            prompts.append([*text_ids(model, rendered, where)])
        else:
            raise ValueError(f"{where} has no text as prompt and no messages; its fields are {sorted(record)}")
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return prompts


def _renderer(folder: Path) -> Callable[[Any, str], str]:
    """What makes a prompt of messages."""
    try:
        from twotower.checkpoints.chat_template import ChatTemplate, Turn
    except ModuleNotFoundError as error:
        raise ValueError(f"chat messages need the package {error.name}; pip install 'twotower[serve]'") from error
    template = ChatTemplate.load(folder)
    if template is None:
        raise ValueError(f"{folder} has no chat template for messages; give each record a prompt instead")

    def render(record: Any, where: str) -> str:
        if not isinstance(record["messages"], list):
            raise ValueError(f"{where} has messages that are no list of objects with role and content")
        try:
            turns = [Turn.read(message) for message in record["messages"]]
            if turns and turns[-1].role == "assistant":
                turns.pop()
            if not turns:
                raise ValueError("must have messages to answer")
            return template.render(turns, tools=record.get("tools"), documents=record.get("documents"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return render
