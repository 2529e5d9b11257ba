"""Making tokenizers from scored pieces, adding a mask token, and cutting a vocabulary down to chosen tokens.

Tokenizers are passed around as the text of a tokenizer.json; one that can't be expressed there exactly is refused.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import tokenizers

# What the mask is called: the first of these that the tokenizer doesn't have. Gemma, for example, has the first.
_MASK_NAMES = ("<mask>", "<|mask|>", "<|twotower_mask|>")

_BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))


class Trimmed(NamedTuple):
    """A smaller vocabulary: the token with new id i is the old token `rows[i]`, except the mask, which is new and whose
    row is a copy of the unknown token's. `tokenizer` is the text of its tokenizer.json."""

    rows: tuple[int, ...]
    mask_token_id: int
    tokenizer: str

    def new_id(self, old_id: int) -> int:
        """The new id of an old token. Raises ValueError if it was not kept."""
        kept = [i for i, row in enumerate(self.rows) if row == old_id and i != self.mask_token_id]
        if not kept:
            raise ValueError(f"token {old_id} is used by the config and not kept; add it to keep_tokens")
        return kept[0]


def byte_token(value: int) -> str:
    """The name of the token that stands for one byte of text that no piece covers."""
    return _BYTE_TOKENS[value]


def scored_merges(pieces: Sequence[str | None], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The list of merges, best first, with which byte-pair encoding does what merging by scores does: every piece split
    into two existing pieces, ranked by the piece's score.

    None in `pieces` marks control and byte tokens, which no merge produces. On a tie of scores SentencePiece and
    llama2.c merge the leftmost pair, which a fixed ranking can't express; here the lower id goes first, then the lower
    ids of the parts. In Llama's vocabulary only runs of spaces tie, and both ways encode them alike.
    """
    ids = {piece: i for i, piece in enumerate(pieces) if piece is not None}
    ranked = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right, (piece[:cut], piece[cut:])))
    return [merge for *_, merge in sorted(ranked)]


def merge_closure(pieces: Sequence[str | None], scores: Sequence[float], wanted: Sequence[int], size: int) -> list[int]:
    """At most `size` ids, sorted: those of `wanted`, in its order, each with the intermediate pieces of its merges.

    A piece can only be encoded if every intermediate piece of its merges is in the vocabulary, so it is taken with all
    of them or not at all. A piece that no longer fits is skipped, and later ones that need fewer pieces are still
    tried. Pieces that merging their characters does not produce are left out. None in `pieces` marks control and byte
    tokens, which need no other piece.
    """
    ranks = {merge: rank for rank, merge in enumerate(scored_merges(pieces, scores))}
    ids = {piece: i for i, piece in enumerate(pieces) if piece is not None}
    kept: set[int] = set()
    for i in wanted:
        if len(kept) >= size:
            break
        if i in kept:
            continue
        piece = pieces[i]
        needed = {i} if piece is None else _spelling(piece, ranks, ids)
        if needed is not None and len(kept | needed) <= size:
            kept |= needed
    return sorted(kept)


def _spelling(piece: str, ranks: Mapping[tuple[str, str], int], ids: Mapping[str, int]) -> set[int] | None:
    """The ids of all pieces that occur while byte-pair encoding merges the piece's characters into it, itself included;
    None if they don't merge into it."""
    parts = list(piece)
    used = {ids[part] for part in parts if part in ids}
    while len(parts) > 1:
        candidates = [(ranks[pair], j) for j, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not candidates:
            return None
        _, j = min(candidates)
        parts[j : j + 2] = [parts[j] + parts[j + 1]]
        used.add(ids[parts[j]])
    return used


def scored_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    control: Collection[int],
    unknown: int,
    first_token: int | None,
    space_prefix: bool = True,
    user_defined: Collection[int] = (),
) -> str:
    """The text of a tokenizer.json for a SentencePiece-style BPE vocabulary; a piece's id is its index in `pieces`.

    Pieces hold plain spaces, not U+2581. A U+2581 in a text is then encoded as bytes, like any character without a
    piece, and decode(encode(text)) == text for every text, except one that spells a control token, which is encoded as
    that token. `first_token` is put before every text, and with `space_prefix` a space before every text that is not
    empty. Decoding drops both, and so it also drops the first space of a text's continuation. `unknown` is the unknown
    token's id; ids in `user_defined` are matched as a whole before merging.

    Raises ValueError for a piece that occurs twice or a vocabulary without the 256 byte tokens.
    """
    double = [piece for piece, count in Counter(pieces).items() if count > 1][:5]
    if double:
        raise ValueError(f"the vocabulary holds the pieces {double} more than once; each id needs its own piece")
    places = {piece: i for i, piece in enumerate(pieces)}
    missing = [token for token in _BYTE_TOKENS if token not in places]
    if missing:
        raise ValueError(
            f"the vocabulary lacks {len(missing)} of 256 byte tokens, first {missing[0]}; use one with all"
        )
    reserved = {*control, *user_defined, *(places[token] for token in _BYTE_TOKENS)}
    merges = scored_merges([None if i in reserved else piece for i, piece in enumerate(pieces)], scores)
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    added = [(i, i in control) for i in sorted({*control, *user_defined})]
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, pieces[i], special=special) for i, special in added],
        "normalizer": {"type": "Prepend", "prepend": " "} if space_prefix else None,
        "pre_tokenizer": None,
        "post_processor": None if first_token is None else first_token_processor(first_token, pieces[first_token]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": pieces[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": places,
            "merges": merges,
        },
    }
    return normal_form(raw)


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`, which is matched in the text before merging."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": content} | flags


def first_token_processor(token_id: int, content: str) -> dict[str, Any]:
    """A tokenizer.json post-processor that puts one token before every text."""
    return ends_processor((token_id, content), None)


def ends_processor(first: tuple[int, str] | None, last: tuple[int, str] | None) -> dict[str, Any]:
    """A tokenizer.json post-processor that puts a token, its id and content, before every text, and one behind it."""

    def around(name: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": type_id}}
        before, after = (
            [] if token is None else [{"SpecialToken": {"id": token[1], "type_id": type_id}}] for token in (first, last)
        )
        return [*before, text, *after]

    used = [token for token in (first, last) if token is not None]
    # Of a pair only the first text gets the first token: pairs are never encoded here
    pair = [*around("A", 0), *around("B", 1)[first is not None :]]
    tokens = {content: {"id": content, "ids": [i], "tokens": [content]} for i, content in used}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens}


def normal_form(raw: Mapping[str, Any]) -> str:
    """A tokenizer.json as the tokenizers library writes it, so that reading and saving it changes no byte."""
    return tokenizers.Tokenizer.from_str(json.dumps(raw)).to_str(pretty=True)


def append_mask(tokenizer: str, mask_token_id: int) -> str:
    """Adds a special token with the given id, which may leave a gap after the tokenizer's own ids.

    Raises ValueError for a tokenizer that is neither BPE nor unigram.
    """
    raw = json.loads(tokenizers.Tokenizer.from_str(tokenizer).to_str())
    vocab, added = raw["model"].get("vocab"), raw["added_tokens"]
    if raw["model"]["type"] not in ("BPE", "Unigram"):
        raise ValueError(
            f"the tokenizer is a {raw['model']['type']}, must be a BPE or unigram; pass mask_token_id of a free token"
        )
    added.append(added_token(mask_token_id, _mask_name(_ids(raw)), special=True))
    names = {token["id"]: token["content"] for token in added}
    # Unless the vocabulary gives an added token's id, the library numbers it from the vocabulary's size on.
    if isinstance(vocab, dict):
        vocab |= {name: i for i, name in names.items()}
    else:
        # A unigram vocabulary has no gaps. Ids without a token get names that no text holds, at the lowest score, which
        # unknown characters are weighed by.
        lowest = min(score for _, score in vocab)
        vocab += [[names.get(i, f"\0no token {i}\0"), lowest] for i in range(len(vocab), mask_token_id + 1)]
    return normal_form(raw)


class Fitted(NamedTuple):
    """The text of a tokenizer.json all of whose tokens have a row, and the names of those that had none."""

    tokenizer: str
    left_out: tuple[str, ...]


def fit(tokenizer: str, num_rows: int) -> Fitted:
    """Leaves out added tokens that have no row in an embedding of `num_rows`: texts that spell them are encoded as
    ordinary text.

    Raises ValueError where a token of the vocabulary itself has no row: the two then don't belong together.
    """
    raw = json.loads(tokenizer)
    beyond = {name: i for name, i in _ids(raw).items() if i >= num_rows}
    if not beyond:
        return Fitted(tokenizer, ())
    left_out = [token["content"] for token in raw["added_tokens"] if token["id"] >= num_rows]
    processor = json.dumps(raw["post_processor"], ensure_ascii=False)
    needed = [name for name in beyond if name not in left_out or json.dumps(name, ensure_ascii=False) in processor]
    if needed:
        raise ValueError(
            f"the tokenizer has {len(beyond)} tokens without a row in the embedding of {num_rows}, first "
            f"{needed[0]!r} with id {beyond[needed[0]]}; take the tokenizer and the weights of one model"
        )
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < num_rows]
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = (
        {name: i for name, i in vocab.items() if i < num_rows} if isinstance(vocab, dict) else vocab[:num_rows]
    )
    return Fitted(normal_form(raw), tuple(left_out))


def _mask_name(ids: Collection[str]) -> str:
    found = next((name for name in _MASK_NAMES if name not in ids), None)
    if found is None:
        raise ValueError(
            f"the tokenizer already has all of {_MASK_NAMES}; pass mask_token_id of one that may be the mask"
        )
    return found


def _ids(raw: Mapping[str, Any]) -> dict[str, int]:
    """The id of each token of a tokenizer.json, added ones included."""
    vocab = raw["model"].get("vocab", {})
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in raw["added_tokens"]}


def trim(tokenizer: str, keep: Collection[int]) -> Trimmed:
    """Cuts a byte-fallback BPE vocabulary down to the ids in `keep`, its special tokens and its 256 byte tokens, and
    adds a mask token.

    The new order is: special tokens, mask, byte tokens, the rest of `keep`, each sorted by old id. A merge is kept
    where its parts and its result are: a text whose tokens are all kept is encoded as before if `keep` also holds their
    intermediate pieces, see `merge_closure`. Raises ValueError for another kind of tokenizer or ids that are no tokens.
    """
    raw = json.loads(tokenizers.Tokenizer.from_str(tokenizer).to_str())
    model = raw["model"]
    vocab: dict[str, int] = model.get("vocab", {})
    if model["type"] != "BPE" or not model["byte_fallback"] or any(token not in vocab for token in _BYTE_TOKENS):
        raise ValueError("the tokenizer is not a BPE with 256 byte tokens; only such vocabularies can be trimmed")
    pieces = {i: piece for piece, i in vocab.items()} | {token["id"]: token["content"] for token in raw["added_tokens"]}
    strange = sorted(set(keep) - set(pieces))
    if strange:
        raise ValueError(f"keep_tokens has {strange[:5]}, which are no tokens; ids are in [0, {max(pieces)}]")
    mask_name = _mask_name(_ids(raw))
    special = sorted(token["id"] for token in raw["added_tokens"] if token["special"])
    first = [*special, *(vocab[token] for token in _BYTE_TOKENS)]
    rest = sorted(set(keep) - set(first))
    mask_token_id = len(special)
    rows = (*special, vocab[model["unk_token"]], *first[len(special) :], *rest)
    names = [mask_name if i == mask_token_id else pieces[row] for i, row in enumerate(rows)]
    ids = {name: i for i, name in enumerate(names)}
    model["vocab"] = ids
    model["merges"] = [m for m in model["merges"] if m[0] in ids and m[1] in ids and m[0] + m[1] in ids]
    added = [token | {"id": ids[token["content"]]} for token in raw["added_tokens"] if token["content"] in ids]
    raw["added_tokens"] = sorted([*added, added_token(mask_token_id, mask_name, special=True)], key=lambda t: t["id"])
    processor = raw["post_processor"]
    if processor is not None:
        if processor["type"] != "TemplateProcessing":
            raise ValueError(f"the tokenizer's post-processor is a {processor['type']}, must be TemplateProcessing")
        for name, token in processor["special_tokens"].items():
            processor["special_tokens"][name] = token | {"ids": [ids[t] for t in token["tokens"]]}
    return Trimmed(rows, mask_token_id, normal_form(raw))
