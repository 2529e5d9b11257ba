"""The error for a setting that can't be, with what a program needs to know of it as fields."""


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
        return f"{name} is {self.value!r}, must be {self.rule}" + (f"; {self.fix}" if self.fix else "")

    def __str__(self) -> str:
        return self.told(self.name)
