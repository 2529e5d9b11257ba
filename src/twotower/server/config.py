"""The settings of a server."""

import dataclasses
from typing import Literal, get_args

from twotower.decoding.modes import Mode
from twotower.errors import SettingError, check_choice, check_integer

MIB = 1 << 20
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server, checked once. A value that is not allowed raises SettingError.

    The server listens on `host` and `port`; port 0 takes a free one. `model_name` is what requests call the model, and
    `default_mode` is for requests that name none. A prompt and its new tokens together have at most `max_context`
    tokens, a request asks for at most `max_choices` texts (prompts times `n`), and its body has at most
    `max_body_bytes`. With `api_keys`, every request but /health and the page's files must carry one of them. Browsers
    let pages of other sites read answers only if their origin is in `cors_origins`. When the server is stopped, running
    requests have `shutdown_seconds` to finish. Log lines below `log_level` are left out.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    default_mode: Mode = "diffusion"
    max_context: int = 4096
    max_choices: int = 64
    max_body_bytes: int = 2 * MIB
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    shutdown_seconds: int = 30
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        for name in ("model_name", "host"):
            if not getattr(self, name):
                raise SettingError(name, getattr(self, name), "a text that is not empty")
        check_choice("default_mode", self.default_mode, get_args(Mode))
        check_choice("log_level", self.log_level, get_args(LogLevel))
        check_integer("port", self.port, 0, 65535)
        for name, low in {"max_context": 2, "max_choices": 1, "max_body_bytes": 1024, "shutdown_seconds": 0}.items():
            check_integer(name, getattr(self, name), low)
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable() and key.strip() == key != ""):
                # the message must not show what may be most of a key
                raise SettingError(
                    "api_keys", "…", "printable ASCII, as HTTP headers carry it, without blanks around it"
                )
