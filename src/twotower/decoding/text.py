"""Turns tokens into text as they come."""

import tokenizers


class TextStream:
    """Decodes a growing token sequence and returns only text that later tokens can't change.

    The prompt's last tokens are decoded together with the new ones, so that spaces before words and byte sequences
    across the boundary come out right. A character is held back until all its bytes have come. Control tokens are left
    out, unless `skip_special_tokens` is False.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, prompt_ids: tuple[int, ...], *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids)
        self._start = self._window()  # ids before this one are no longer decoded
        whole = self._decode(self._ids[self._start :])
        self._shown = len(whole)
        if whole.endswith("\ufffd"):
            # The prompt may end inside a character; if new tokens complete it, it belongs to the new text.
            ends = (self._decode(self._ids[self._start : len(self._ids) - n]) for n in range(4))
            self._shown = max(len(text.rstrip("\ufffd")) for text in ends)
        self._dangling = whole[self._shown :]
        self.text = ""

    def push(self, ids: list[int]) -> str:
        """Appends tokens and returns the text that they made final."""
        self._ids.extend(ids)
        whole = self._decode(self._ids[self._start :])
        # an incomplete byte sequence decodes to U+FFFD at the end
        certain = whole.rstrip("\ufffd")
        piece = self._give(certain)
        if len(certain) == len(whole) and len(self._ids) - self._start > 64:
            self._start = self._window()
            self._shown = len(self._decode(self._ids[self._start :]))
        return piece

    def flush(self) -> str:
        """Returns the held-back text: a byte sequence that never became a character."""
        # Decode it separately: a byte-fallback decoder would also give up on the complete characters before it.
        for held in range(4):
            end = len(self._ids) - held
            whole = self._decode(self._ids[self._start : end])
            if not whole.endswith("\ufffd"):
                return self._give(whole + self._decode(self._ids[end:]))
        return self._give(self._decode(self._ids[self._start :]))

    def _window(self) -> int:
        """An index about 8 tokens before the end, at the first byte of a character: byte-fallback decoders give up on a
        whole run of bytes that starts inside a character."""
        last = max(len(self._ids) - 8, 0)
        return next((n for n in range(last, max(last - 4, -1), -1) if self._begins_character(n)), last)

    def _begins_character(self, n: int) -> bool:
        return any(not self._decode(self._ids[n : n + size]).startswith("\ufffd") for size in range(1, 5))

    def _give(self, whole: str) -> str:
        piece = whole[self._shown :]
        self._shown += len(piece)
        if not self.text:
            piece = piece.removeprefix(self._dangling)
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
