"""A model for lm-evaluation-harness that decodes with a two-tower checkpoint, in any mode.

    python -m twotower.eval.lm_eval --model twotower --model_args pretrained=CHECKPOINT,mode=diffusion --tasks …

is lm_eval's own command line with this model in it; lm_eval does not find models of other packages by itself. Without
`pretrained` the model is the shipped stories checkpoint. Every setting of SamplingParams is a model argument, and so is
dtype.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
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
from twotower.decoding.prompt import text_ids
from twotower.decoding.scoring import score
from twotower.eval.tasks import Example

# All that a task may set of a generation, its length under any of these names; _MAX_GEN_TOKS if it sets no length.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")
_MAX_GEN_TOKS = 256
# Settings of other models that tasks may name, with the value that means no change here; others are refused.
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


class Loglikelihood(NamedTuple):
    """The pair that lm_eval takes: some tokens' summed log-probabilities, and whether each is the likeliest."""

    log_probability: float
    is_greedy: bool


class TwoTowerLM(TemplateLM):
    """Log-likelihoods under the context tower, and generation in the mode that the model arguments name.

    The harness passes `max_batch_size` to every model; here it has no effect, as there is no automatic batch size.
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
        self.params = SamplingParams(**({"seed": 0, "temperature": 0.0} | settings))
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # lm_eval passes cuda if its user names no device
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
        """The token that stands before a text without context."""
        first = self.model.config.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int | None:
        """The number of positions of the checkpoint; None if its config names no limit."""
        return self.model.config.trained_positions

    @property
    def tokenizer_name(self) -> str:
        """The model's name in lm_eval's cache of requests."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, for lm_eval's record of a run; None if no template is applied."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"apply_chat_template is {chat_template!r}, but only the default one is read; drop the name"
            )
        return self._chat().source if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for the next message of the assistant, or for the rest of the last one."""
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        return self._chat().render(turns, continue_last=not add_generation_prompt)

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            raise ValueError(f"checkpoint {self._name} has no chat template; drop --apply_chat_template")
        return self._template

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template writes the first token itself
            first = self.model.config.bos_token_id
            written = None if first is None else self.encoder.id_to_token(first)
            add_special_tokens = not written or not string.startswith(written)
        return list(text_ids(self.model, string, "text", special=add_special_tokens))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers every (context, generation settings) pair; the number of the request is added to the seed.

        A context that leaves too few of the checkpoint's positions for the answer is cut at its start. Raises
        ValueError if the answer alone may need all of them.
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

    def _room(self, max_new_tokens: int | None) -> int:
        """The most tokens that a context may have before an answer of so many; 0 for no limit."""
        if self.max_length is None or max_new_tokens is None:
            return 0
        if max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {max_new_tokens}, must be below {self.max_length}, the checkpoint's positions; "
                "set it with --gen_kwargs max_gen_toks=…"
            )
        return self.max_length - max_new_tokens

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of every text, in windows if it has more tokens than the checkpoint has positions."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            longest = self.max_length or len(ids)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, max(1, longest), 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(_joined(self._score([(context, new) for context, new in pairs])).log_probability)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Loglikelihood]:
        windows = [self._windows(context, new) for _, context, new in requests]
        scores = iter(self._score([pair for own in windows for pair in own]))
        found = [_joined(list(itertools.islice(scores, len(own)))) for own in windows]
        for (texts, _, _), scored in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, scored)
        return found

    def _windows(self, context: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
        """The pair, or several of as many new tokens as fit if these are more than the checkpoint has positions."""
        most = self.max_length or max(1, len(new))
        return [([*context, *new[:start]], new[start : start + most]) for start in range(0, len(new), most)]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Loglikelihood]:
        """The new tokens of every (context, new tokens) pair; a context that is too long is cut at its start."""
        texts, contexts = [new for _, new in pairs], [context for context, _ in pairs]
        if self.max_length is not None:
            # One more than the positions: no score depends on what the model makes of the last token
            room = [self.max_length + 1 - len(new) for new in texts]
            contexts = [context[-left:] for context, left in zip(contexts, room, strict=True)]
        found = score(self.model, texts, contexts, batch_size=self.batch_size)
        return [Loglikelihood(own.total, all(own.is_greedy)) for own in found]

    def _params(self, asked: Mapping[str, Any], index: int) -> SamplingParams:
        """The settings of request number `index`, with the length, stop strings and sampling that its task sets."""
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
            top_k=None if top_k in (0, -1) else top_k,  # other models keep every token with these
            top_p=None if temperature == 0 else asked.get("top_p", base.top_p),
            seed=base.seed + index,
        )


def _joined(windows: Sequence[Loglikelihood]) -> Loglikelihood:
    return Loglikelihood(sum(w.log_probability for w in windows), all(w.is_greedy for w in windows))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Judges a reply as `twotower eval` does, loops included, for an lm_eval task over one of our task files.

    Such a task has `process_results: !function twotower.eval.lm_eval.process_results`. Raises ValueError for a line
    that lm_eval can't ask or judge, which has filler or is scored by the context tower.
    """
    # datasets puts None for a key that only other lines have
    given = {name: value for name, value in doc.items() if value is not None}
    example = Example.from_dict(given)
    if example.distance or example.scorer == "likelihood":
        what = f"distance {example.distance}" if example.distance else "scorer 'likelihood'"
        raise ValueError(f"an example has {what}, which needs the model itself; measure it with twotower eval")
    return {"score": example.score(results[0])}


def main() -> None:
    """Runs lm_eval's command line with the model `twotower` in it."""
    register_model("twotower")(TwoTowerLM)
    cli_evaluate()


if __name__ == "__main__":
    # Run under its own name: tasks that name its functions would import it a second time beside __main__
    from twotower.eval import lm_eval

    lm_eval.main()
