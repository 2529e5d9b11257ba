"""Texts that must match a JSON schema, a regular expression or a grammar. Letters: b rows, s positions, v vocabulary.

llguidance decides which tokens may come next. The others get probability 0 before sampling, so modes that decide from
left to right work as before on the constrained distribution: `verified` still has that of `ar`. Blocks are filled from
left to right (`Guides.follow_block`). If a text exceeds llguidance's limits, only its end is allowed from there on.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import tokenizers
import torch
from torch import Tensor

from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Allow only one spacing: an unsure model would fill its answer with the optional blanks of JSON.
_JSON_STYLE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TOO_LARGE = "panic: assertion failed: grammar.symbols.len() < u16::MAX as usize - 10"
# What llguidance says -> what it means
_PROBLEMS = {"NoExtensionBias": "no text matches it", _TOO_LARGE: "it is too large"}
# Most characters that an error shows of what llguidance says, which may have the whole constraint in it.
_MOST_SAID = 300
# Most characters of a grammar in GBNF, which are translated in Python, about a million a second.
_MOST_GBNF = 200_000


@dataclasses.dataclass(frozen=True)
class Guides:
    """Each row's matcher, advanced past all tokens produced so far and those that its block begins with, or None for a
    row without a constraint (b); and the model's `ends`, the tokens that end a text."""

    rows: "tuple[LLMatcher | None, ...]"
    ends: tuple[int, ...]

    @property
    def any(self) -> bool:
        """Whether any row has a constraint."""
        return any(guide is not None for guide in self.rows)

    def select(self, rows: list[int]) -> Self:
        """The guides of some rows."""
        return dataclasses.replace(self, rows=tuple(self.rows[r] for r in rows))

    def join(self, others: Self) -> Self:
        """The guides of both batches' rows."""
        return dataclasses.replace(self, rows=self.rows + others.rows)

    def after(self, tokens: Sequence[Sequence[int]]) -> Self:
        """The guides after each row has also produced these tokens; tokens after an end token are ignored."""
        if not self.any:
            return self
        return dataclasses.replace(
            self, rows=tuple(self._follow(guide, ids) for guide, ids in zip(self.rows, tokens, strict=True))
        )

    def mask_(self, logits: Tensor, row: int, draft: Sequence[int]) -> None:
        """Gives -inf to what is not allowed in a row's logits (s, v), where place k follows the first k draft tokens.

        Where every allowed token has -inf already, by another setting or because a grammar names the mask, which no
        tower ever writes, the text ends. Places after a forbidden draft token are left as they are, because no draft
        is accepted that far.
        """
        guide = self.rows[row]
        if guide is None:
            return
        ahead = guide.deep_copy()
        for k, own in enumerate(logits):
            allowed = allowed_tokens(ahead)
            own.masked_fill_(~allowed.to(own.device), -torch.inf)
            own[self.ends[0]] = torch.where((own == -torch.inf).all(), 0.0, own[self.ends[0]])
            if k >= len(draft) or not allowed[draft[k]] or draft[k] in self.ends:
                break
            ahead.consume_token(draft[k])

    def follow_block(
        self, row: int, proposed: Sequence[int], wanted: Sequence[bool], *, forces: bool
    ) -> "tuple[LLMatcher, list[int]]":
        """The tokens that a block's open places get in one step, from the first of them on, and the matcher after them.

        The first place takes what is `proposed` for it, which `mask_` has allowed. Those behind it take theirs as long
        as a commit rule has `wanted` it and the text can go on with it; with `forces`, places of which only one token
        is possible take that. Behind a text's end the block takes everything, because nobody reads it.
        """
        guide = self.rows[row]
        assert guide is not None
        ahead, ids = guide.deep_copy(), list[int]()
        while (place := len(ids)) < len(proposed):
            if ahead.is_stopped():
                if place > 0 and not forces:
                    break
                new = [proposed[place] if proposed[place] in self.ends else self.ends[0]]
            else:
                stop = next((k for k in range(max(place, 1), len(proposed)) if not wanted[k]), len(proposed))
                run = list(proposed[place:stop])
                new = run[: ahead.validate_tokens(run) or int(place == 0)]
                if not new and forces:
                    run = ahead.compute_ff_tokens()[: len(proposed) - place]
                    new = run[: ahead.validate_tokens(run)]
            ended = next((k for k, i in enumerate(new) if i in self.ends), None)
            if ended is not None:
                ids += new[: ended + 1]
                return ahead, ids + list(proposed[len(ids) :])
            if not new:
                break
            ahead.consume_tokens(new)
            ids += new
        return ahead, ids

    def _follow(self, guide: "LLMatcher | None", ids: Sequence[int]) -> "LLMatcher | None":
        if guide is None or not ids:
            return guide
        ahead = guide.deep_copy()
        for i in ids:
            if ahead.is_stopped():
                break
            ahead.consume_token(i)
        return ahead


def guides(model: TwoTower, params: Sequence[SamplingParams], produced: Sequence[Sequence[int]]) -> Guides:
    """The guides of rows that have produced some tokens already."""
    fresh = tuple(None if p.constraint is None else _matcher(_vocabulary(model), *p.constraint) for p in params)
    return Guides(fresh, model.config.eos_token_ids).after(produced)


def allowed_tokens(guide: "LLMatcher") -> Tensor:
    """Which tokens may come next, (v) bool on the CPU."""
    # a bytearray, because torch warns about read-only memory
    return torch.frombuffer(bytearray(guide.compute_logit_bias()), dtype=torch.uint8) > 0


def first_tokens(model: TwoTower, params: SamplingParams) -> Tensor | None:
    """Which tokens a text with a constraint may begin with, (v) bool on the CPU; None without a constraint."""
    if params.constraint is None:
        return None
    return allowed_tokens(_matcher(_vocabulary(model), *params.constraint).deep_copy())


def check_constraint(model: TwoTower, params: SamplingParams) -> None:
    """Raises SettingError if the request's constraint is invalid or this model can't enforce it."""
    if params.constraint is None:
        return
    kind, text = params.constraint
    if model.tokenizer is None or not model.config.eos_token_ids:
        rule = "None for a checkpoint without a tokenizer.json or without an eos_token_id"
        raise SettingError(kind, text, rule, "drop it")
    try:
        import llguidance  # noqa: F401
    except ModuleNotFoundError as error:
        rule = "None where the package llguidance is not installed"
        raise SettingError(kind, text, rule, "pip install 'twotower[guide]'") from error
    _matcher(_vocabulary(model), kind, text)


def _vocabulary(model: TwoTower) -> "LLTokenizer":
    assert model.tokenizer is not None
    return _read_vocabulary(model.tokenizer, model.config.vocab_size, model.config.eos_token_ids)


@functools.lru_cache(maxsize=4)
def _read_vocabulary(tokenizer: tokenizers.Tokenizer, size: int, ends: tuple[int, ...]) -> "LLTokenizer":
    """The tokenizer for llguidance; cached, because a large one takes more than a tenth of a second."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=list(ends))


@functools.lru_cache(maxsize=64)
def _matcher(vocabulary: "LLTokenizer", kind: str, text: str) -> "LLMatcher":
    """A matcher before its first token; callers copy it before use. Raises SettingError for an invalid constraint."""
    from llguidance import LLMatcher

    grammar = _compiled(kind, text)
    problem = LLMatcher.validate_grammar(grammar, vocabulary)
    if not problem:
        first = LLMatcher(vocabulary, grammar, log_level=0)
        first.compute_logit_bias()  # finds most constraints that exceed its limits
        problem = first.get_error()
    if problem:
        raise _unfollowable(kind, text, problem)
    return LLMatcher(vocabulary, grammar, log_level=0)


def behind(kind: str, text: str, before: str) -> str:
    """A `grammar` whose texts begin as the rules `before` say, in Lark with a rule `start`, and go on, where these have
    `@held`, with what matches a constraint. Raises SettingError for a constraint that can't be read."""
    [held, *parts] = json.loads(_compiled(kind, text))["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": before}, {**held, "name": "held"}, *parts]})


def _compiled(kind: str, text: str) -> str:
    """A constraint as llguidance's JSON, which a `grammar` may be already. Raises SettingError if it can't be read."""
    from llguidance import LLMatcher

    if kind == "json_schema":
        try:
            json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SettingError(kind, text, f"JSON, which it is not ({error})", "correct it") from error
        try:
            return LLMatcher.grammar_from_json_schema(text, defaults=_JSON_STYLE)
        except ValueError as error:  # it reads no JSON that is nested more than a hundred levels deep
            raise _unfollowable(kind, text, str(error)) from error
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return text if text.startswith("{") else json.dumps({"grammars": [{"lark_grammar": _lark(text)}]})


def _unfollowable(kind: str, text: str, problem: str) -> SettingError:
    """The error for a constraint, with what llguidance says of it cut before its internals, and where it is long."""
    said = " ".join(re.split("<state>|<backtrace>", problem)[0].split())
    said = _PROBLEMS.get(said, said)
    shown = said if len(said) <= _MOST_SAID else said[:_MOST_SAID] + "…"
    return SettingError(kind, text, f"a constraint that llguidance can follow ({shown})", "correct it")


def _lark(grammar: str) -> str:
    """A grammar in llguidance's Lark; one in llama.cpp's GBNF, which has a rule `root`, is translated."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if not re.search(r"^\s*root\s*::=", grammar, re.MULTILINE):
        return grammar
    if len(grammar) > _MOST_GBNF:
        raise SettingError("grammar", grammar, f"at most {_MOST_GBNF} characters in GBNF", "write it in Lark")
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # for a wrong grammar it raises Exception itself, IndexError and RecursionError, too
        raise _unfollowable("grammar", grammar, str(error)) from error
