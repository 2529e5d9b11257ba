"""What the terminal chat asks of whoever answers: a model in this process, or a server."""

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

from twotower.cli.live import FixedPlace
from twotower.decoding.params import SamplingParams


class Said(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


class AnswerSettings(NamedTuple):
    """How to answer. `chosen` are the fields of `params` that the user has set; a server gets no others."""

    params: SamplingParams
    chosen: frozenset[str]


class AnswerEnd(NamedTuple):
    """Why an answer ended, and what it cost; None where a server doesn't say. `num_context` is how many tokens prompt
    and answer have together, of at most `max_context`."""

    finish_reason: str | None
    num_tokens: int | None = None
    denoiser_calls: int | None = None
    context_calls: int | None = None
    num_context: int | None = None
    max_context: int | None = None


class Moment(NamedTuple):
    """A piece of an answer: text that became certain, the block in progress behind it, and at last the end."""

    text: str
    places: tuple[FixedPlace | None, ...] = ()
    end: AnswerEnd | None = None


class AnswerFailed(ValueError):
    """The answer can't be given, or broke off; the message says why."""


class Answering(Protocol):
    """Who answers."""

    @property
    def about(self) -> str:
        """Who it is, in a few words."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether there is no chat template, so that messages are written in a plain form."""
        ...

    def moments(self, messages: Sequence[Said], settings: AnswerSettings) -> Generator[Moment, None, None]:
        """The answer to the messages, piece by piece; closing the iterator stops it.

        Raises ValueError for what can't be answered, AnswerFailed if the answer breaks off, KeyboardInterrupt for
        Ctrl-C.
        """
        ...


# Where an answer in the plain form ends: the model would go on with the user's next message.
PLAIN_STOP = "\nUser:"
_NAMES = {"user": "User: ", "assistant": "Assistant: "}


def plain_form(messages: Sequence[Said]) -> str:
    """The prompt for a model without a chat template."""
    return "\n\n".join(_NAMES.get(m.role, "") + m.content.strip() for m in messages) + "\n\nAssistant:"
