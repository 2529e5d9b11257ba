"""The settings of one request."""

import dataclasses
from typing import Any, Literal, get_args

from twotower.decoding.modes import AUTO_SUMMARY, CONSTRAINED_MODES, MODES, Mode
from twotower.errors import SettingError
from twotower.model.sampling_defaults import SamplingDefaults
from twotower.options import check_options, option

CommitRule = Literal["confidence", "margin", "entropy", "fixed", "leftmost", "posterior", "remask"]
# Most positions of a block and most steps that it may take: far more than is of use, and what tensors can count.
MAX_BLOCK = 1 << 16
COMMIT_RULES: tuple[str, ...] = get_args(CommitRule)
_SUMMARIES = [*((mode.name, mode.summary) for mode in MODES.values()), ("auto", AUTO_SUMMARY.replace("`", ""))]
_EVERY_TOKEN = "leave it None to keep every token"
_MOST_TOKENS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's settings.

    `block_size`, `steps_per_block` and `confidence_threshold` are S, T and γ of the paper. A text ends before a `stop`
    string, which may name control tokens, such as <|im_end|>, and with an end token unless `ignore_eos`.

    What is None is the checkpoint's own: its `block_size`, and the `temperature`, `top_k`, `top_p` and `max_new_tokens`
    of its generation_config.json, if that has them; `settled` has all of them.

    At most one of `json_schema` (its text), `regex` and `grammar` (llguidance's Lark) is given. The text must match it,
    and `constraint` is its name and value.

    With mode `auto` an engine chooses the mode of every step: `ar` or `verified`, whose outputs have the same
    distribution, and with `allow_loss` also `diffusion`, whose output has another one.
    """

    mode: Mode = option("diffusion", " ".join(f"{mode}: {summary}" for mode, summary in _SUMMARIES))
    max_new_tokens: int | None = option(
        None, "Most tokens to write.", least=0, shown_default="the checkpoint's, or 128"
    )
    block_size: int | None = option(
        None,
        "Tokens that are filled together; for verified the longest draft.",
        least=1,
        most=MAX_BLOCK,
        shown_default="the checkpoint's",
    )
    steps_per_block: int = option(
        16, "Most denoising steps of a block; the last one commits all that is left.", least=1, most=MAX_BLOCK
    )
    confidence_threshold: float = option(
        0.8, "A token whose probability is above this is committed at once.", least=0, most=1
    )
    commit_rule: CommitRule = option("confidence", "How diffusion chooses the positions that a step commits.")
    temperature: float | None = option(
        None,
        "0 takes the likeliest token; above 0 tokens are sampled.",
        least=0,
        most=100,
        shown_default="the checkpoint's, or 0",
        fix="0 is greedy",
    )
    top_k: int | None = option(
        None,
        "Sample among this many likeliest tokens.",
        least=1,
        shown_default="the checkpoint's, or all",
        fix=_EVERY_TOKEN,
    )
    top_p: float | None = option(
        None,
        "Sample among the likeliest tokens that together have this probability.",
        least=0,
        most=1,
        shown_default="the checkpoint's, or 1",
        fix=_EVERY_TOKEN,
    )
    seed: int | None = option(
        None, "Decides what is sampled: one seed gives one text.", least=0, shown_default="a new one"
    )
    stop: tuple[str, ...] = option((), "End before this text; may be given several times.", shown_default="none")
    ignore_eos: bool = option(False, "Go on after an end token.", flag="--ignore-eos")
    past_positions: bool = option(
        False,
        "Go beyond the positions that the checkpoint was trained for, its max_position_embeddings.",
        flag="--past-positions",
    )
    allow_loss: bool = option(False, "Let auto choose diffusion too.", flag="--allow-loss")
    adaptive_draft: bool = option(
        True,
        "Let the draft of verified follow how much was accepted lately; otherwise it is as long as a block.",
        flag="--adaptive-draft/--fixed-draft",
    )
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise SettingError("stop", self.stop, "a sequence of non-empty strings", "write stop=('…',)")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_options(self)
        if (
            self.temperature is not None and 0 < self.temperature < 1e-6
        ):  # logits divided by it must stay finite in float32
            raise SettingError("temperature", self.temperature, "0 or in [1e-06, 100]", "0 is greedy")
        if self.top_p == 0:
            raise SettingError("top_p", self.top_p, "a number in (0, 1]", "temperature=0 is the greedy setting")
        if self.seed is not None and self.seed >= 2**63:
            raise SettingError("seed", self.seed, "in [0, 2**63)", "take it modulo 2**63")
        if self.commit_rule != "confidence" and (self.mode == "auto" or "commit_rule" not in MODES[self.mode].settings):
            rule = f"'confidence' in mode {self.mode!r}"
            raise SettingError("commit_rule", self.commit_rule, rule, "only mode 'diffusion' reads it: drop it")
        if self.allow_loss and self.mode != "auto":
            rule = f"False in mode {self.mode!r}"
            raise SettingError("allow_loss", self.allow_loss, rule, "only mode 'auto' reads it: drop it")
        self._check_constraint()

    def settled(self, block_size: int, defaults: SamplingDefaults) -> "SamplingParams":
        """These settings for a checkpoint with its own `block_size` and defaults, in which only `top_k` and `top_p` may
        be None, which then means all tokens."""
        usual: dict[str, Any] = {
            "max_new_tokens": defaults.max_new_tokens or _MOST_TOKENS,
            "block_size": block_size,
            "temperature": defaults.temperature or 0.0,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
        }
        return dataclasses.replace(self, **{name: v for name, v in usual.items() if getattr(self, name) is None})

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Which of `json_schema`, `regex` and `grammar` is given, and its text."""
        given = (("json_schema", self.json_schema), ("regex", self.regex), ("grammar", self.grammar))
        return next(((name, text) for name, text in given if text is not None), None)

    def _check_constraint(self) -> None:
        if self.constraint is None:
            return
        name = self.constraint[0]
        for other in ("json_schema", "regex", "grammar"):
            value = getattr(self, other)
            if value is not None and (not isinstance(value, str) or not value):
                raise SettingError(other, value, "a text that is not empty", "leave it None for none")
            if value is not None and other != name:
                raise SettingError(other, value, f"None beside {name}", "a text can follow only one of them")
        if self.mode not in CONSTRAINED_MODES or self.allow_loss:
            where = f"mode {self.mode!r}" + (" with allow_loss" if self.allow_loss else "")
            fix = "it can't follow a constraint: use mode 'ar' or 'verified'"
            raise SettingError(name, getattr(self, name), f"None in {where}", fix)
        if self.ignore_eos:
            fix = "an end token is how a text that matches it ends"
            raise SettingError("ignore_eos", self.ignore_eos, f"False where {name} is given", fix)
