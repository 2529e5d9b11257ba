"""The model of lm-evaluation-harness that decodes with a two-tower checkpoint, in any mode.

    python -m twotower.eval.lm_eval --model twotower --model_args pretrained=CHECKPOINT,mode=diffusion --tasks …

is lm_eval's own command line, which by itself finds no models of other packages. Without `pretrained` it is the shipped
stories checkpoint; every setting of SamplingParams is a model argument, and so is dtype.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from twotower.checkpoints.chat_template import ChatTemplate, Turn
from twotower.checkpoints.hf import resolve
from twotower.checkpoints.load import DEFAULT_CHECKPOINT, load
from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.eval.scoring import score_text
from twotower.eval.tasks import Example

# What a task may say about a generation; its length, under all of its names, where the task says none.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")
_MAX_GEN_TOKS = 256
# What tasks say for other models and means nothing but the default: other values are mistakes.
_NEUTRAL: dict[str, float] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_p": 0,
    "typical_p": 1,
    "early_stopping": False,
    "use_cache": True,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}


class Scored(NamedTuple):
    """Sum of log-probabilities of some tokens, and whether each is the likeliest at its place."""

    log_probability: float
    is_greedy: bool


class TwoTowerLM(TemplateLM):
    """Log-likelihoods by the context tower; generation in the mode of the model arguments.

    `max_batch_size` is what the harness passes to every model; there is no automatic batch size.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        known = {field.name for field in dataclasses.fields(SamplingParams)} - {"stop", "max_new_tokens"}
        if set(settings) - known:
            raise ValueError(f"model_args have {sorted(set(settings) - known)}, known settings are {sorted(known)}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, must be float32 or bfloat16")
        size = 1 if batch_size is None else batch_size
        if not str(size).isdigit() or int(size) < 1:
            raise ValueError(f"batch_size is {size!r}, must be an integer of at least 1")
        self.batch_size = int(size)
        self.params = SamplingParams(**({"seed": 0} | settings))
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # what lm_eval passes where its user names no device
            warnings.warn(f"device is {device!r}, but this build of torch sees no GPU: running on cpu", stacklevel=2)
            device = "cpu"
        self._name = pretrained or "stories"
        self._template = ChatTemplate.load(DEFAULT_CHECKPOINT if pretrained is None else resolve(pretrained))
        self.model = load(pretrained, device=device or "cpu", dtype=_DTYPES[dtype])
        if self.model.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.json, which lm_eval's texts need; add one")
        self.encoder = self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        ends = self.model.config.eos_token_ids
        if not ends:
            raise ValueError("the config has no eos_token_id, which lm_eval needs; add one")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has no context."""
        first = self.model.config.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int | None:
        """Positions of the checkpoint; None where it names no limit."""
        return self.model.config.carried.get("max_position_embeddings")

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's cache of requests goes by."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for lm_eval's record of a run; None where none is to be applied."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"apply_chat_template is {chat_template!r}, but only the default one is read; drop the name"
            )
        return self._chat().source if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for the next assistant message; without `add_generation_prompt` for the rest of the last one."""
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        return self._chat().render(turns, continue_last=not add_generation_prompt)

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            raise ValueError(f"checkpoint {self._name} has no chat template; drop --apply_chat_template")
        return self._template

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # chat templates write the token that texts begin with themselves
            first = self.model.config.bos_token_id
            written = None if first is None else self.encoder.id_to_token(first)
            add_special_tokens = not written or not string.startswith(written)
        return list(self.encoder.encode(string, add_special_tokens=add_special_tokens).ids)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers every (context, generation settings) pair; the request's number is added to the seed.

        A context that leaves too few of the checkpoint's positions for the answer loses its start. Raises ValueError
        where the answer alone needs all of them.
        """
        settings = [self._params(request.args[1], i) for i, request in enumerate(requests)]
        prompts = [
            self.tok_encode(request.args[0])[-self._room(own.max_new_tokens) :]
            for request, own in zip(requests, settings, strict=True)
        ]
        texts = []
        for start in range(0, len(prompts), self.batch_size):
            end = start + self.batch_size
            texts += [done.text or "" for done in generate(self.model, prompts[start:end], settings[start:end])]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _room(self, max_new_tokens: int) -> int:
        """Most tokens of a context before an answer of so many; 0 for any number."""
        if self.max_length is None:
            return 0
        if max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {max_new_tokens}, must be below {self.max_length}, the checkpoint's positions; "
                "set it with --gen_kwargs max_gen_toks=…"
            )
        return self.max_length - max_new_tokens

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of every whole text, in windows where it has more tokens than the checkpoint positions."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            longest = self.max_length or len(ids)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, max(1, longest), 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(self._score([(pair[0], pair[1])])[0].log_probability for pair in pairs))
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        windows = [self._windows(context, new) for _, context, new in requests]
        pairs = [pair for own in windows for pair in own]
        batches = (pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size))
        scores = itertools.chain.from_iterable(map(self._score, batches))
        found = [_joined(list(itertools.islice(scores, len(own)))) for own in windows]
        for (texts, _, _), scored in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, scored)
        return found

    def _windows(self, context: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
        """The pair, or where its new tokens are more than the checkpoint positions several, each of as many as fit."""
        most = self.max_length or max(1, len(new))
        return [([*context, *new[:start]], new[start : start + most]) for start in range(0, len(new), most)]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """The context tower over (context, new tokens) pairs as one batch; what is too long loses its start."""
        most = self.max_length
        rows = [[*context, *new] if most is None else [*context, *new][-most - 1 :] for context, new in pairs]
        table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)  # padding comes after everything that a row reads
        logits = self.model.context_logits(table[:, :-1]).cpu()
        found = []
        for ids, (_, new), own in zip(rows, pairs, logits, strict=True):
            predicted, truth = own[len(ids) - 1 - len(new) : len(ids) - 1], torch.tensor(ids[len(ids) - len(new) :])
            total = -F.cross_entropy(predicted, truth, reduction="sum").item()
            found.append(Scored(total, bool((predicted.argmax(-1) == truth).all())))
        return found

    def _params(self, asked: Mapping[str, Any], index: int) -> SamplingParams:
        """The settings of request number `index`, whose task decides about length, stops and sampling."""
        asked = {name: value for name, value in asked.items() if value is not None}
        foreign = {k: v for k, v in asked.items() if k not in _GENERATION and (k not in _NEUTRAL or v != _NEUTRAL[k])}
        if foreign:
            raise ValueError(
                f"generation_kwargs have {foreign}, known are {_GENERATION}, and at no other value {_NEUTRAL}"
            )
        base = self.params
        assert base.seed is not None
        stops = asked.get("until", [])
        temperature = 0.0 if asked.get("do_sample") is False else asked.get("temperature", base.temperature)
        top_k = asked.get("top_k", base.top_k)
        return dataclasses.replace(
            base,
            max_new_tokens=next((asked[name] for name in _LENGTHS if name in asked), _MAX_GEN_TOKS),
            stop=(stops,) if isinstance(stops, str) else tuple(stops),
            temperature=temperature,
            top_k=None if top_k in (0, -1) else top_k,  # that is how others say that every token is kept
            top_p=None if temperature == 0 else asked.get("top_p", base.top_p),
            seed=base.seed + index,
        )


def _joined(windows: Sequence[Scored]) -> Scored:
    return Scored(sum(w.log_probability for w in windows), all(w.is_greedy for w in windows))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores an answer as `twotower eval` does, loops included, for a lm_eval task over one of our task files.

    Such a task says `process_results: !function twotower.eval.lm_eval.process_results`. Raises ValueError for lines
    that lm_eval can't ask or judge: with filler, or scored by the context tower.
    """
    # datasets puts None where a line lacks a key that others have
    given = {name: value for name, value in doc.items() if value is not None}
    example = Example.from_dict(given)
    if example.distance or example.scorer == "likelihood":
        what = f"distance {example.distance}" if example.distance else "scorer 'likelihood'"
        raise ValueError(f"an example has {what}, which needs the model itself; measure it with twotower eval")
    return {"score": score_text(example, results[0])}


def main() -> None:
    """lm_eval's command line, with the model `twotower` in it."""
    register_model("twotower")(TwoTowerLM)
    cli_evaluate()


if __name__ == "__main__":
    # Under its own name, so that tasks that name its functions don't import it a second time.
    from twotower.eval import lm_eval

    lm_eval.main()
