"""The texts and the bytes of single tokens."""

import codecs
import copy
import json
import re
from typing import Self

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenNames:
    """What single tokens stand for in a text, which leaves control tokens out."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._skip = True
        # Some decoders drop the first space of a text, so a token is decoded behind another one.
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self._alone = len(tokenizer.decode(self._anchor))
        decoder = json.loads(tokenizer.to_str())["decoder"]
        kinds = {one["type"] for one in _flat(decoder)}
        self._byte_of = _gpt2_bytes() if "ByteLevel" in kinds else {}
        self._falls_back = "ByteFallback" in kinds

    def with_control_tokens(self) -> Self:
        """The same for a text that has the names of control tokens."""
        found = copy.copy(self)
        found._skip = False
        return found

    def text(self, token: int, *, first: bool = False) -> str | None:
        """The token's own text; None for control tokens that are left out and for tokens that are only a part of a
        character. `first` says that it begins the text: some decoders take a space from it then."""
        piece = self._decode([token]) if first else self._decode([*self._anchor, token])[self._alone :]
        return piece if piece and "\ufffd" not in piece else None

    def bytes(self, token: int, *, first: bool = False) -> bytes:
        """The bytes that the token adds to a text, none for what is left out; `first` says that it begins the text.

        The bytes of all tokens joined are the text in UTF-8, also where a token is only a part of a character.
        """
        text = self.text(token, first=first)
        if text is not None:
            return text.encode()
        if not self._decode([token]):
            return b""
        name = self._tokenizer.id_to_token(token) or ""
        found = _BYTE_TOKEN.fullmatch(name)
        if self._falls_back and found is not None:
            return bytes([int(found[1], 16)])
        return bytes(self._byte_of[c] for c in name) if self._byte_of.keys() >= set(name) else b""

    def is_control(self, token: int) -> bool:
        """Whether the token has no text but its name."""
        return not self._tokenizer.decode([*self._anchor, token])[self._alone :]

    def name(self, token: int, *, first: bool = False) -> str:
        """The token's text; its bytes, as OpenAI writes them, where it is a part of a character; its name in the
        vocabulary where it has no text."""
        text = self.text(token, first=first)
        if text is not None:
            return text
        own = self.bytes(token, first=first)
        if own:
            return "bytes:" + "".join(rf"\x{byte:02x}" for byte in own)
        if first and not self.is_control(token):
            return ""  # a space that the decoder takes
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class TextOffsets:
    """Where in a text its tokens begin, in characters. A token that is the later part of a character begins where that
    character does."""

    def __init__(self, names: TokenNames, start: int = 0, *, echo: str = "") -> None:
        """`start` is the number of characters before the first token; the text begins with `echo`, if that is given,
        and its tokens are the first. Control tokens are counted there where the echo has their names."""
        self._names = names
        self._offset = start
        self.at_start = bool(echo)  # whether the next token begins the text
        self._echo = echo
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def copy(self) -> Self:
        """Offsets that go on from here on their own."""
        found = copy.copy(self)
        found._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        found._decoder.setstate(self._decoder.getstate())
        return found

    def push(self, token: int) -> int:
        """The offset of the next token."""
        own = self._names.bytes(token, first=self.at_start)
        if self._offset < len(self._echo) and self._names.is_control(token):
            name = self._names.name(token)
            own = name.encode() if self._echo.startswith(name, self._offset) else b""
        self.at_start = self.at_start and self._names.is_control(token)
        begin, held = self._offset, self._decoder.getstate()[0]
        if held and own and not _begins_character(held + own[:1]):
            begin += len(held.decode(errors="replace"))  # it never became a character
        self._offset += len(self._decoder.decode(own))
        return begin


def _begins_character(found: bytes) -> bool:
    """Whether bytes are a character of UTF-8 or the beginning of one."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(found)
    except UnicodeDecodeError:
        return False
    return True


def _flat(decoder: "dict[str, object] | None") -> "list[dict[str, object]]":
    """A decoder's parts, where it is a sequence of them."""
    if decoder is None:
        return []
    parts = decoder.get("decoders")
    return [leaf for part in parts for leaf in _flat(part)] if isinstance(parts, list) else [decoder]


def _gpt2_bytes() -> dict[str, int]:
    """The byte that each printable stand-in of byte-level vocabularies means."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
