"""The settings of one request."""

import dataclasses
from typing import Literal, get_args

from twotower.decoding.modes import CONSTRAINED_MODES, MODES, Mode
from twotower.errors import SettingError, check_choice, check_flag, check_integer, check_number

CommitRule = Literal["confidence", "margin", "entropy", "fixed", "leftmost", "posterior", "remask"]
# Most positions of a block and most steps that it may take: far more than is of use, and what tensors can count.
MAX_BLOCK = 1 << 16
COMMIT_RULES: tuple[str, ...] = get_args(CommitRule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's settings. `mode` and `commit_rule` name the algorithm; the rest are its numbers.

    At most `max_new_tokens` are written. `block_size` is S, the tokens that are filled together (for `verified` the
    draft's length, which is shorter at times unless `adaptive_draft` is off); `steps_per_block` is T, the most
    denoising steps that a block may take; `confidence_threshold` is γ.

    `temperature` 0 takes the likeliest token. Above 0 tokens are sampled, among the `top_k` likeliest or among the
    likeliest that together have probability `top_p`, where these are given. `seed` None draws one.
    `stop` strings end the text before them; an end token ends it unless `ignore_eos`.

    At most one of `json_schema` (its text), `regex` and `grammar` (llguidance's Lark) is what the text must match.

    `auto` leaves the mode to an engine, step by step: `ar` or `verified`, whose output is distributed alike, and where
    `allow_loss` says so `diffusion`, whose output is not.
    """

    mode: Mode = "diffusion"
    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    commit_rule: CommitRule = "confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    allow_loss: bool = False
    adaptive_draft: bool = True
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise SettingError("stop", self.stop, "a sequence of non-empty strings", "write stop=('…',)")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_choice("mode", self.mode, (*MODES, "auto"))
        check_choice("commit_rule", self.commit_rule, COMMIT_RULES)
        check_integer("max_new_tokens", self.max_new_tokens, 0)
        check_integer("block_size", self.block_size, 1, MAX_BLOCK)
        check_integer("steps_per_block", self.steps_per_block, 1, MAX_BLOCK)
        check_number("confidence_threshold", self.confidence_threshold, 0, 1)
        check_number("temperature", self.temperature, 0, 100, "0 is greedy")
        if 0 < self.temperature < 1e-6:  # logits divided by it must stay finite in float32
            raise SettingError("temperature", self.temperature, "0 or in [1e-06, 100]", "0 is greedy")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1, fix="leave it None to keep every token")
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0, 1, "leave it None to keep every token")
            if self.top_p == 0:
                raise SettingError("top_p", self.top_p, "a number in (0, 1]", "temperature=0 is the greedy setting")
        if self.seed is not None:
            check_integer("seed", self.seed, 0)
            if self.seed >= 2**63:
                raise SettingError("seed", self.seed, "in [0, 2**63)", "take it modulo 2**63")
        for name in ("ignore_eos", "allow_loss", "adaptive_draft"):
            check_flag(name, getattr(self, name))
        if self.commit_rule != "confidence" and (self.mode == "auto" or "commit_rule" not in MODES[self.mode].settings):
            rule = f"'confidence' in mode {self.mode!r}"
            raise SettingError("commit_rule", self.commit_rule, rule, "only mode 'diffusion' reads it: drop it")
        if self.allow_loss and self.mode != "auto":
            rule = f"False in mode {self.mode!r}"
            raise SettingError("allow_loss", self.allow_loss, rule, "only mode 'auto' reads it: drop it")
        self._check_constraint()

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
