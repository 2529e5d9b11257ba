"""The settings of a server."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.decoding.drafters import DRAFTERS, draft_sources
from twotower.decoding.modes import Mode
from twotower.engine.memory_plan import USUAL_CONTEXT
from twotower.errors import SettingError
from twotower.options import check_options, option
from twotower.server.reasoning import ReasoningParser
from twotower.server.tools.choice import ToolParser

MIB = 1 << 20
# Where neither the settings nor the checkpoint say how long a text may be.
MAX_CONTEXT = USUAL_CONTEXT
KEY_RULE = "printable ASCII, as HTTP headers carry it, without blanks around it"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
_ROOT_PATH = re.compile(r"(/[^/\s?#]+)+")
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server, checked once. A value that is not allowed raises SettingError.

    Every request but those for /health and the page's files must carry one of the `api_keys`, if there are any.
    """

    model_names: tuple[str, ...] = option(
        (),
        "What requests call the model; several may be given, and answers have the first.",
        shown_default="the checkpoint's directory or hub id",
        flag="--name",
        other_flag="--served-model-name",
    )
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", least=0, most=65535)
    default_mode: Mode = option("diffusion", "Mode of requests that name none.", flag="--mode")
    default_drafter: str | None = option(
        None,
        f"Where drafts of verified come from if a request doesn't say: of {', '.join(DRAFTERS)}, with commas.",
        shown_default="the checkpoint's, or denoiser",
        flag="--drafter",
    )
    target_retention: float | None = option(
        None,
        "Share of ar's score that diffusion is to keep at temperature 0, by the checkpoint's calibration, in requests "
        "that don't say how blocks are filled.",
        above=0,
        below=1,
        shown_default="none: a threshold",
        fix="--mode verified keeps all of it",
    )
    max_context: int | None = option(
        None,
        "Most tokens of a prompt and its answer.",
        least=2,
        shown_default=f"the checkpoint's, or {MAX_CONTEXT}",
        other_flag="--max-model-len",
    )
    tool_parser: ToolParser = option(
        "auto",
        "How the model writes calls of tools; auto goes by the chat template.",
        other_flag="--tool-call-parser",
    )
    reasoning_parser: ReasoningParser = option(
        "auto", "How the model marks its reasoning, which answers have apart; auto goes by the chat template."
    )
    max_choices: int = option(64, "Most texts that one request may ask for: its prompts times n.", least=1)
    max_body_bytes: int = option(2 * MIB, "Most bytes of a request's body.", least=1024)
    api_keys: tuple[str, ...] = option(
        (),
        "Key that requests must carry; several may be given.",
        shown_default="none",
        flag="--api-key",
        envvar="TWOTOWER_API_KEY",
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "Web site whose pages may use the server; several may be given.",
        shown_default="none",
        flag="--cors-origin",
        other_flag="--allowed-origins",
    )
    root_path: str = option(
        "",
        "Path at which a proxy shows the server, such as /llm; requests may come with it or without.",
        shown_default="none",
    )
    ssl_certfile: str | None = option(
        None, "File with the certificate for HTTPS, and those that lead to its authority.", shown_default="HTTP"
    )
    ssl_keyfile: str | None = option(
        None, "File with the certificate's private key.", shown_default="in the certificate's file"
    )
    shutdown_seconds: int = option(
        30, "How long running requests may take to finish when the server is stopped.", least=0
    )
    idle_seconds: int = option(
        75,
        "How long a connection may be silent before it is closed; a request whose bytes only trickle is silent, too.",
        least=1,
        other_flag="--timeout-keep-alive",
    )
    unread_seconds: int = option(
        300, "How long a client may take none of the bytes of its answer before its connection is closed.", least=1
    )
    log_level: LogLevel = option("info", "Least level of log lines.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.default_drafter is not None:
            draft_sources(self.default_drafter)
        for name, texts in (("model_names", self.model_names), ("host", (self.host,))):
            if "" in texts:
                raise SettingError(name, "", "a text that is not empty")
        if not all(map(is_key, self.api_keys)):
            # the message must not show what may be most of a key
            raise SettingError("api_keys", "…", KEY_RULE)
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise SettingError(
                    "cors_origins", origin, "an origin such as https://example.org, without a path, or *"
                )
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise SettingError("root_path", self.root_path, "a path such as /llm, without a slash at its end")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            fix = "give --ssl-certfile too"
            raise SettingError("ssl_keyfile", self.ssl_keyfile, "the key of a certificate", fix)


def served_name(model: str | None) -> str:
    """What requests call a model where the settings have no name: its directory's name, or its hub id."""
    if model is None:
        return DEFAULT_CHECKPOINT.name
    return Path(model).resolve().name if Path(model).is_dir() else model


def is_key(text: str) -> bool:
    """Whether a text can be an API key."""
    return text.isascii() and text.isprintable() and text.strip() == text != ""


def read_keys(file: Path) -> tuple[str, ...]:
    """The API keys of a file, one on each line; empty lines are none. Raises ValueError for a file without a key, and
    for a line that can't be one."""
    keys = []
    for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        if line.strip() and not is_key(line.strip()):
            raise ValueError(f"line {number} of {file} is no API key, which must be {KEY_RULE}")
        keys += [line.strip()] if line.strip() else []
    if not keys:
        raise ValueError(f"{file} has no API key, must have one on each line")
    return tuple(keys)
