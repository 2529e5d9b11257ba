"""The error for a setting that can't be, with what a program needs to know of it as fields, and the usual checks."""

from collections.abc import Sequence

# Characters of a value that a message shows: a JSON schema may have many thousands.
_SHOWN = 200


class SettingError(ValueError):
    """A setting has a value that is not allowed.

    `name` is the setting as its dataclass or function spells it, `value` what was given, `rule` what is allowed ("an
    integer in [1, 16]") and `fix` what to do instead, empty where the rule says enough. The message is made of them:
    "block_size is 0, must be an integer in [1, 16]; leave it out for the model's own". Whoever shows the error under
    another name, as the server and the command line do, reads the fields and never the message.
    """

    def __init__(self, name: str, value: object, rule: str, fix: str = "") -> None:
        super().__init__(name, value, rule, fix)
        self.name = name
        self.value = value
        self.rule = rule
        self.fix = fix

    def told(self, name: str) -> str:
        """The message, with the setting called `name`."""
        shown = repr(self.value)
        if len(shown) > _SHOWN:
            shown = shown[:_SHOWN] + "…"
        return f"{name} is {shown}, must be {self.rule}" + (f"; {self.fix}" if self.fix else "")

    def __str__(self) -> str:
        return self.told(self.name)


def check_integer(name: str, value: object, low: int, high: int | None = None, fix: str = "") -> None:
    """Raises SettingError unless `value` is an integer of at least `low` and, where it is given, at most `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        rule = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
        raise SettingError(name, value, rule, fix)


def check_choice(name: str, value: object, allowed: Sequence[str], fix: str = "") -> None:
    """Raises SettingError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise SettingError(name, value, f"one of {', '.join(allowed)}", fix)


def check_flag(name: str, value: object) -> None:
    """Raises SettingError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise SettingError(name, value, "True or False")
