"""A GGUF file's begin and end tokens and its chat templates."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from twotower.checkpoints.gguf.reader import shown
from twotower.checkpoints.vocabulary import ends_processor

logger = logging.getLogger(__name__)

# llama.cpp's ids where a SentencePiece vocabulary names none; for BPE it has no sensible ones.
_SENTENCE_PIECE = {"bos": 1, "eos": 2, "unknown": 0}
_KEYS = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")
# Kinds of token at which llama.cpp ends a text: of the text, the turn, a call of a tool, and a part of a repository.
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Names at which llama.cpp ends a text, whatever the metadata says.
_END_NAMES = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> "
    "<REPO> <reponame> <|file_sep|>"
)
# Vocabularies in which a token of such a name ends nothing: the name, and the ends beside which that holds.
_NO_ENDS = (
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|call|>", "<|flush|>")),
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
    ("</s>", ("<|plamo:eos|>",)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """`texts` is the vocabulary, empty if the file has none; `ids` are the tokens of each kind that it has."""

    path: Path
    metadata: Mapping[str, Any]
    texts: Sequence[str]
    ids: Mapping[str, int]

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, Any]) -> Self:
        """Those of a file's metadata. An id outside of the vocabulary is left out with a warning, as llama.cpp does."""
        texts = metadata.get("tokenizer.ggml.tokens", ())
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path} has tokenizer.ggml.tokens {shown(texts)}, must be texts; take another file")
        ids = dict(_SENTENCE_PIECE) if metadata.get("tokenizer.ggml.model") == "llama" else {}
        ids = {kind: i for kind, i in ids.items() if i < len(texts)}
        for kind in _KEYS:
            key = f"tokenizer.ggml.{kind}_token_id"
            found = metadata.get(key)
            if found is not None and type(found) is not int:
                raise ValueError(f"{path} has {key} {shown(found)}, must be the number of a token; take another file")
            if found is not None and (found < 0 or (texts and found >= len(texts))):
                logger.warning("%s: %s is %d, left out: there are %d tokens", path, key, found, len(texts))
            elif found is not None:
                ids[kind] = found
        return cls(path=path, metadata=metadata, texts=texts, ids=ids)

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token at which llama.cpp ends a text, the file's eos first."""
        end_names = frozenset(_END_NAMES.split())
        named = [i for i, text in enumerate(self.texts) if text in end_names]
        ends = dict.fromkeys([*(self.ids[kind] for kind in _ENDS if kind in self.ids), *named])
        names = {self.texts[i]: i for i in ends if self.texts}
        for name, beside in _NO_ENDS:
            if name in names and all(other in names for other in beside):
                ends.pop(names[name], None)
        return tuple(ends)

    def processor(self, *, adds_bos: bool) -> dict[str, Any] | None:
        """tokenizer.json's entry that puts begin and end tokens around a text, where the file asks for them; `adds_bos`
        is llama.cpp's default. Raises ValueError where the file doesn't say which token that is."""
        adds = {"bos": adds_bos, "eos": False}
        kinds = [
            kind for kind, default in adds.items() if self.metadata.get(f"tokenizer.ggml.add_{kind}_token", default)
        ]
        missing = [kind for kind in kinds if kind not in self.ids]
        if missing:
            raise ValueError(
                f"the tokenizer of {self.path} puts a token {missing[0]} around texts, but tokenizer.ggml."
                f"{missing[0]}_token_id does not say which; set it with the gguf package's gguf-new-metadata "
                f"--special-token {missing[0]} TEXT"
            )
        first, last = ((self.ids[k], self.texts[self.ids[k]]) if k in kinds else None for k in adds)
        return ends_processor(first, last) if kinds else None

    def documents(self) -> dict[str, bytes]:
        """The chat templates, and the texts of the tokens that they write, in the files that transformers reads."""
        named = {
            key.removeprefix("tokenizer.chat_template."): text
            for key, text in self.metadata.items()
            if key.startswith("tokenizer.chat_template.")
        }
        default = self.metadata.get("tokenizer.chat_template")
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} if self.texts else {}
        settings |= {names[kind]: self.texts[i] for kind, i in self.ids.items() if kind in names and self.texts}
        found = {}
        if named:
            templates = {} if default is None else {"default": default}
            settings["chat_template"] = [{"name": n, "template": t} for n, t in {**templates, **named}.items()]
        elif default is not None:
            found["chat_template.jinja"] = default.encode()
        if settings:
            found["tokenizer_config.json"] = json.dumps(settings, indent=1, ensure_ascii=False).encode()
        return found
