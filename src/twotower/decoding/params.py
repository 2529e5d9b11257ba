"""The settings of one request."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from twotower.decoding.drafters import DRAFTER_HELP, draft_sources
from twotower.decoding.lists import MOST_BAD_WORDS, bias_pairs, id_tuple, parse_biases, text_tuple
from twotower.decoding.modes import AUTO_SUMMARY, DRAFTING_MODES, MODES, Mode
from twotower.errors import SettingError
from twotower.model.sampling_defaults import LEAST_DIVISOR, MOST_REPETITION_PENALTY, SamplingDefaults
from twotower.options import check_options, option

CommitRule = Literal["confidence", "margin", "entropy", "entropy_bound", "fixed", "leftmost", "posterior", "remask"]
# Most positions of a block and most steps that it may take: far more than is of use, and what tensors can count.
MAX_BLOCK = 1 << 16
COMMIT_RULES: tuple[str, ...] = get_args(CommitRule)
_SUMMARIES = [*((mode.name, mode.summary) for mode in MODES.values()), ("auto", AUTO_SUMMARY.replace("`", ""))]
# γ of the paper, and the bound of diffusers' scheduler of this rule.
DEFAULT_THRESHOLD, DEFAULT_ENTROPY_BOUND = 0.8, 0.1
_EVERY_TOKEN = "leave it None to keep every token"
_MOST_TOKENS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's settings.

    `block_size`, `steps_per_block` and `confidence_threshold` are S, T and γ of the paper. A text ends before a `stop`
    string, which may name control tokens, such as <|im_end|>, and with an end token unless `ignore_eos`.

    What is None is the checkpoint's own: its `block_size`, and the `temperature`, `top_k`, `top_p`, `min_p`,
    `typical_p`, `repetition_penalty`, `max_new_tokens` and `drafter` of its generation_config.json, if that has them;
    `settled` has all of them.

    The settings that change logits are vLLM's. They work in this order on the logits l of a place, where a token has
    occurred n times in the text written so far:

    1. `allowed_token_ids`: l = −∞ for every other token. `bad_words`: l = −∞ for the last token of such a word where
       the tokens before it are there. `min_tokens`: l = −∞ for end and stop tokens as long as fewer are written.
    2. `logit_bias`: l + bias.
    3. `repetition_penalty` r: l / r where l > 0, else l·r, for tokens of the prompt and those with n > 0.
    4. `frequency_penalty` f and `presence_penalty` p: l − f·n − p·[n > 0].
    5. A constraint: l = −∞ for what the format doesn't allow there.
    6. At a `temperature` above 0: l / temperature, then the filters `min_p`, `top_k`, `top_p` and `typical_p` in turn.

    In `verified`, the text before a place has the draft's tokens before it, so that its output is distributed as that
    of `ar`. In `diffusion` and `simulated_ar` it has what is committed anywhere in the block. Confidences, and
    the log-probabilities that `logprobs` asks for, are the model's own, without all of these.

    At most one of `json_schema` (its text), `regex` and `grammar` (llguidance's Lark, or llama.cpp's GBNF) is given.
    The text must match it, and `constraint` is its name and value.

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
    confidence_threshold: float | None = option(
        None,
        "A token whose probability is above this is committed at once.",
        least=0,
        most=1,
        shown_default=f"{DEFAULT_THRESHOLD:g}",
    )
    target_retention: float | None = option(
        None,
        "Share of ar's score that diffusion is to keep at temperature 0, by the checkpoint's calibration, in place of "
        "a threshold.",
        above=0,
        below=1,
        shown_default="none",
        fix="verified keeps all of it",
    )
    commit_rule: CommitRule = option("confidence", "How diffusion chooses the positions that a step commits.")
    entropy_bound: float | None = option(
        None,
        "With entropy_bound as commit rule: most entropy, in nats, of what a step commits, but for its unsurest token.",
        least=0,
        shown_default=f"{DEFAULT_ENTROPY_BOUND:g}",
    )
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
    min_p: float | None = option(
        None,
        "Sample among tokens that are at least this part as likely as the likeliest.",
        least=0,
        most=1,
        shown_default="the checkpoint's, or 0",
    )
    typical_p: float | None = option(
        None,
        "Sample among the tokens of the most typical surprise that together have this probability.",
        above=0,
        most=1,
        shown_default="the checkpoint's, or 1",
        fix="1 keeps every token",
    )
    repetition_penalty: float | None = option(
        None,
        "Above 1 makes tokens of the prompt and the text less likely to come again.",
        above=0,
        most=MOST_REPETITION_PENALTY,
        shown_default="the checkpoint's, or 1",
        fix="1 changes nothing",
    )
    presence_penalty: float = option(
        0.0, "Above 0 makes tokens that the text has less likely to come again.", least=-2, most=2
    )
    frequency_penalty: float = option(
        0.0, "Above 0 makes tokens less likely with every time that the text has them.", least=-2, most=2
    )
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = option(
        (),
        "What to add to the logits of tokens, such as 50=-100,7=2.5 by their ids; each in [-100, 100].",
        shown_default="none",
        parse=parse_biases,
    )
    allowed_token_ids: tuple[int, ...] | None = option(
        None, "Write these tokens alone, by their ids, such as 5,17.", shown_default="all"
    )
    bad_words: tuple[str, ...] = option(
        (), "Never complete this text; may be given several times.", shown_default="none"
    )
    seed: int | None = option(
        None, "Decides what is sampled: one seed gives one text.", least=0, shown_default="a new one"
    )
    stop: tuple[str, ...] = option((), "End before this text; may be given several times.", shown_default="none")
    include_stop_str_in_output: bool = option(
        False, "Let the text have the stop string that ended it.", flag="--include-stop-str-in-output"
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "End after these tokens too, by their ids, such as 5,17.", shown_default="none"
    )
    ignore_eos: bool = option(False, "Go on after an end token.", flag="--ignore-eos")
    min_tokens: int = option(
        0, "Write so many tokens before an end token, a stop token or a stop string may end the text.", least=0
    )
    skip_special_tokens: bool = option(True, "Leave control tokens out of the text.")
    truncate_prompt_tokens: int | None = option(
        None, "Read only so many tokens of the prompt, its last ones.", least=1, shown_default="all"
    )
    logprobs: int = option(
        0,
        "Give so many of the likeliest tokens at each place, with their log-probabilities.",
        least=0,
    )
    past_positions: bool = option(
        False,
        "Go beyond the positions that the checkpoint was trained for, its max_position_embeddings.",
        flag="--past-positions",
    )
    allow_loss: bool = option(False, "Let auto choose diffusion too.", flag="--allow-loss")
    drafter: str | None = option(None, DRAFTER_HELP, shown_default="the checkpoint's, or denoiser")
    adaptive_draft: bool = option(
        True,
        "Let the denoiser's draft follow how much was accepted lately; otherwise it is as long as a block.",
        flag="--adaptive-draft/--fixed-draft",
    )
    priority: int = option(0, "Which requests an engine takes up first: those of the lowest number.")
    cache_salt: str | None = option(
        None, "Share cached prompts only with requests of the same salt.", shown_default="none"
    )
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        self._read_lists()
        check_options(self)
        for name, fix in (("temperature", "0 is greedy"), ("repetition_penalty", "1 changes nothing")):
            value = getattr(self, name)
            if value is not None and 0 < value < LEAST_DIVISOR:
                whole = "0 or in [1e-06, 100]" if name == "temperature" else "in [1e-06, 1000]"
                raise SettingError(name, value, whole, fix)
        if self.top_p == 0:
            raise SettingError("top_p", self.top_p, "a number in (0, 1]", "temperature=0 is the greedy setting")
        if self.seed is not None and self.seed >= 2**63:
            raise SettingError("seed", self.seed, "in [0, 2**63)", "take it modulo 2**63")
        if self.commit_rule != "confidence" and (self.mode == "auto" or "commit_rule" not in MODES[self.mode].settings):
            rule = f"'confidence' in mode {self.mode!r}"
            raise SettingError("commit_rule", self.commit_rule, rule, "only mode 'diffusion' reads it: drop it")
        self._check_commits()
        if self.allow_loss and self.mode != "auto":
            rule = f"False in mode {self.mode!r}"
            raise SettingError("allow_loss", self.allow_loss, rule, "only mode 'auto' reads it: drop it")
        if self.drafter is not None:
            draft_sources(self.drafter)
            if self.mode not in DRAFTING_MODES:
                fix = "only modes 'verified' and 'auto' draft: choose one of them, or drop it"
                raise SettingError("drafter", self.drafter, f"left out in mode {self.mode!r}", fix)
        if self.cache_salt == "":
            raise SettingError("cache_salt", self.cache_salt, "a text that is not empty", "leave it None for none")
        self._check_constraint()

    def _check_commits(self) -> None:
        """Refuses settings of commits that another one replaces."""
        if self.entropy_bound is not None and self.commit_rule != "entropy_bound":
            rule = f"left out with commit_rule {self.commit_rule!r}"
            raise SettingError("entropy_bound", self.entropy_bound, rule, "only commit_rule='entropy_bound' reads it")
        if self.target_retention is None:
            return
        if self.mode != "diffusion" and not self.allow_loss:
            rule, fix = f"left out in mode {self.mode!r}", "only 'diffusion', and 'auto' with allow_loss, read it"
        elif self.confidence_threshold is not None:
            rule, fix = "left out beside confidence_threshold", "the calibration has thresholds of its own: drop one"
        elif self.commit_rule != "confidence":
            rule = f"left out with commit_rule {self.commit_rule!r}"
            fix = "the calibration is a rule of its own: drop one"
        else:
            return
        raise SettingError("target_retention", self.target_retention, rule, fix)

    def _read_lists(self) -> None:
        """Makes tuples of the settings that are lists, so that requests can be compared and hashed."""
        lists: dict[str, Any] = {
            "stop": text_tuple("stop", self.stop),
            "bad_words": text_tuple("bad_words", self.bad_words),
        }
        if len(lists["bad_words"]) > MOST_BAD_WORDS:
            raise SettingError("bad_words", self.bad_words, f"at most {MOST_BAD_WORDS} strings")
        lists["stop_token_ids"] = id_tuple("stop_token_ids", self.stop_token_ids)
        lists["logit_bias"] = bias_pairs("logit_bias", self.logit_bias)
        if self.allowed_token_ids is not None:
            lists["allowed_token_ids"] = id_tuple("allowed_token_ids", self.allowed_token_ids)
            if not lists["allowed_token_ids"]:
                raise SettingError("allowed_token_ids", self.allowed_token_ids, "not empty", "leave it None for all")
        for name, value in lists.items():
            object.__setattr__(self, name, value)

    def settled(self, block_size: int, defaults: SamplingDefaults) -> "SamplingParams":
        """These settings for a checkpoint with its own `block_size` and defaults, in which only the filters,
        `repetition_penalty` and what another setting replaces may be None, which then means none."""
        usual: dict[str, Any] = {
            "max_new_tokens": defaults.max_new_tokens or _MOST_TOKENS,
            "block_size": block_size,
            "confidence_threshold": DEFAULT_THRESHOLD if self.target_retention is None else None,
            "entropy_bound": DEFAULT_ENTROPY_BOUND if self.commit_rule == "entropy_bound" else None,
            "temperature": defaults.temperature or 0.0,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "typical_p": defaults.typical_p,
            "repetition_penalty": defaults.repetition_penalty,
        }
        if self.mode in DRAFTING_MODES:
            usual["drafter"] = defaults.drafter or "denoiser"
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
        if self.commit_rule == "remask":
            fix = "it masks places again on which those behind them depend: use another one"
            raise SettingError("commit_rule", self.commit_rule, f"another rule where {name} is given", fix)
        if self.ignore_eos:
            fix = "an end token is how a text that matches it ends"
            raise SettingError("ignore_eos", self.ignore_eos, f"False where {name} is given", fix)
