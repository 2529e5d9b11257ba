"""llm, the command line and its Python library."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from calls import QUESTION, SCHEMA, given, named, report, shown

url, model = given()
folder = tempfile.TemporaryDirectory()
common = {"model_name": model, "api_base": f"{url}/v1", "supports_tools": True, "supports_schema": True}
models = [
    {"model_id": "served", **common},
    {"model_id": "written", **common, "completion": True},
    {"model_id": "responding", **common, "responses": True},
]
Path(folder.name, "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML


def _llm(*arguments: str) -> str:
    """What the command prints. Raises RuntimeError with the last line of its errors."""
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    environment = os.environ | {"LLM_USER_PATH": folder.name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def completion() -> str:
    return shown(_llm("-m", "written", "Once upon a time"))


def chat() -> str:
    return shown(_llm("-m", "served", QUESTION, "--no-stream"))


def chat_stream() -> str:
    return shown(_llm("-m", "served", QUESTION))


def second_turn() -> str:
    return shown(_llm("-m", "served", "-c", "And then?"))


def schema() -> str:
    return str(json.loads(_llm("-m", "served", "--schema", json.dumps(SCHEMA), QUESTION)))


def tools() -> str:
    return shown(_llm("-m", "served", "-T", "llm_version", "-T", "llm_time", QUESTION))


def responses() -> str:
    return shown(_llm("-m", "responding", QUESTION))


report(named(completion, chat, chat_stream, second_turn, schema, responses) | {"-T": tools})
folder.cleanup()
