"""Files of prompts, to token ids."""

from collections.abc import Iterator
from pathlib import Path

from twotower.decoding.prompt import text_ids
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.conversations import Conversations, messages_field
from twotower.training.corpus.documents import check_text
from twotower.training.corpus.text import read_lines, read_records


def read_prompts(file: Path, model: TwoTower, folder: Path) -> list[list[int]]:
    """The prompts of a file: lines of a .txt, or records with a `prompt` or with chat `messages`, which the template of
    the checkpoint in `folder` renders, but for a last one of the assistant's. Raises ValueError, naming the place."""
    if model.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json to read prompts with; add one")
    found = _lines(file) if file.name.lower().endswith((".txt", ".txt.gz", ".txt.zst")) else _records(file, folder)
    # A chat template writes the control tokens that a prompt begins with.
    prompts = [[*text_ids(model, prompt, where, special=not rendered)] for where, prompt, rendered in found]
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return prompts


def _lines(file: Path) -> Iterator[tuple[str, str, bool]]:
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            yield f"{file} line {number}", line, False


def _records(file: Path, folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Where each record is, its prompt, and whether that was rendered from messages."""
    chat = Conversations(folder)
    for record in read_records(file):
        prompt = record.fields.get("prompt")
        field = messages_field(record, "prompt")
        if field is not None:
            yield record.where, chat.prompt(record, field), True
        elif isinstance(prompt, str):
            yield record.where, check_text(prompt, record.where), False
        else:
            raise ValueError(
                f"{record.where} has no text as prompt and no messages; its fields are {sorted(record.fields)}"
            )
