"""The settings of a server."""

import dataclasses
from typing import Literal

from twotower.decoding.modes import Mode
from twotower.errors import SettingError
from twotower.options import check_options, option

MIB = 1 << 20
# Where neither the settings nor the checkpoint say how long a text may be.
MAX_CONTEXT = 4096
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server, checked once. A value that is not allowed raises SettingError.

    Every request but those for /health and the page's files must carry one of the `api_keys`, if there are any.
    """

    model_name: str | None = option(
        None,
        "What requests call the model.",
        shown_default="the checkpoint's directory or hub id",
        flag="--name",
    )
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", least=0, most=65535)
    default_mode: Mode = option("diffusion", "Mode of requests that name none.", flag="--mode")
    max_context: int | None = option(
        None,
        "Most tokens of a prompt and its answer.",
        least=2,
        shown_default=f"the checkpoint's, or {MAX_CONTEXT}",
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
    )
    shutdown_seconds: int = option(
        30, "How long running requests may take to finish when the server is stopped.", least=0
    )
    log_level: LogLevel = option("info", "Least level of log lines.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("model_name", "host"):
            if getattr(self, name) == "":
                raise SettingError(name, "", "a text that is not empty")
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable() and key.strip() == key != ""):
                # the message must not show what may be most of a key
                rule = "printable ASCII, as HTTP headers carry it, without blanks around it"
                raise SettingError("api_keys", "…", rule)
