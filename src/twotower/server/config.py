"""What a server allows."""

import dataclasses
from typing import get_args

from twotower.decoding.params import Mode

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server, checked once.

    `model_name` is what requests call the model. `default_mode` is for requests that name none. A prompt and its new
    tokens together have at most `max_context` tokens. A request has at most `max_choices` texts to write (prompts times
    `n`) and `max_body_bytes`. With `api_keys`, every request but /health and the page's files must carry one of them.
    Browsers on other sites may only read answers if their origin is in `cors_origins`.
    """

    model_name: str
    default_mode: Mode = "diffusion"
    max_context: int = 4096
    max_choices: int = 64
    max_body_bytes: int = 2 * MIB
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ValueError("model_name is empty, must be a name that requests can give; choose one")
        if self.default_mode not in get_args(Mode):
            raise ValueError(f"default_mode is {self.default_mode!r}, must be one of {', '.join(get_args(Mode))}")
        for name, low in {"max_context": 2, "max_choices": 1, "max_body_bytes": 1024}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least {low}")
        if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in self.api_keys):
            raise ValueError("an API key is empty or has characters that headers can't carry; use printable ASCII")
