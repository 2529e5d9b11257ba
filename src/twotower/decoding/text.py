"""Tokens to text as they come."""

import tokenizers


class TextStream:
    """Decodes a growing token sequence; gives only text that later tokens can't change.

    A tail of the prompt is decoded with the new tokens, so that word-initial spaces and byte sequences that straddle
    the boundary come out right. Characters whose bytes are not all there yet are held back.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-8:])
        self._shown = len(self._decode(self._ids))
        self._start = 0  # ids before this one are settled and no longer decoded
        self.text = ""

    def push(self, ids: list[int]) -> str:
        """The text that became certain with these tokens."""
        self._ids.extend(ids)
        whole = self._decode(self._ids[self._start :])
        # an incomplete byte sequence decodes to U+FFFD at the end
        certain = whole.rstrip("\ufffd")
        piece = certain[self._shown :]
        if piece:
            self._shown += len(piece)
            self.text += piece
        if len(certain) == len(whole) and len(self._ids) - self._start > 64:
            self._start = len(self._ids) - 8
            self._shown = len(self._decode(self._ids[self._start :]))
        return piece

    def flush(self) -> str:
        """What was held back: a byte sequence that never became a character."""
        piece = self._decode(self._ids[self._start :])[self._shown :]
        self._shown += len(piece)
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
