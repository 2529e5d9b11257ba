"""What an operator decides about a server."""

import dataclasses

from twotower.decoding.params import Mode

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """One server's settings, checked once.

    `model_name` is what requests call the model. `max_context` bounds the tokens of a prompt and its answer together,
    `max_body_bytes` a request's body. `api_keys` empty lets everybody in; `cors_origins` empty lets no other site's
    page in. `retry_after` is what an overloaded server asks clients to wait, in seconds.
    """

    model_name: str
    max_context: int
    default_mode: Mode = "diffusion"
    max_body_bytes: int = 4 * MIB
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    retry_after: int = 1
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ValueError("model_name is empty; name the model that requests ask for")
        for name, low in {"max_context": 2, "max_body_bytes": 1, "retry_after": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {low}")
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ValueError("an API key is empty or not printable ASCII, which no client can send; choose another")
