"""llama.cpp's pre-tokenizers of byte-level BPE: how each cuts a text into words before merging.

The regular expressions are those of src/llama-vocab.cpp (MIT), where each cuts what the one before it left. Where that
file names the model's own expression beside the one that its own engine can run, the model's own is here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """The expressions, in order; what they match and what lies between are words.

    With `whole_words` a word that is in the vocabulary is that token even where merging would not give it. `adds_bos`
    is whether llama.cpp puts the begin token before a text if the file doesn't say. `normal_form` makes texts NFC, as
    the models' own tokenizers do, though llama.cpp does not. `marks_spaces`: spaces become U+2581 and characters
    without a token bytes such as <0x0A>, where the others write every byte as a character of GPT-2's alphabet.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    normal_form: bool = False
    marks_spaces: bool = False

    def entries(self) -> list[dict[str, Any]]:
        """The entries of tokenizer.json."""
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
            for expression in self.expressions
        ]
        return splits if self.marks_spaces else [*splits, byte_level(split=False)]


def byte_level(*, split: bool) -> dict[str, Any]:
    """tokenizer.json's entry for GPT-2's alphabet of bytes; `split` also cuts into GPT-2's words."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split}


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _ENDINGS + _WORDS + r"|\p{N}" + _REST
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPACES = "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """Words that change from capitals to small letters once, as in GPT-4o's tokenizer."""
    head = r"[^\r\n\p{L}\p{N}]?"
    words = f"{head}{_UPPER}*{_LOWER}+{ending}|{head}{_UPPER}+{_LOWER}*{ending}"
    return words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_GPT4O = _cased(_ENDINGS + "?", r"|\p{N}{1,3}")
_GROUPS_OF_THREE = r"\d{1,3}(?=(?:\d{3})*\b)"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKED = _ASCII_MARKS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", _CJK, _MARKED + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_LATIN = (
    r"\s?"
    "[A-Za-z\u00b5À-ÖØ-öø-ƺƼ-ƿ\u01c4-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-\u03f5Ϸ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅ"
    "Ὀ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇ"
    "Ꞌ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943]+"
)
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
    "\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_PUNCTUATION = " ?[^(\\s|.,!?…。，、।۔،)]+"
_NEWLINES = r"[^\n]+|[\n]+"

# Sets of expressions by the name of the first model that has them.
_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_LIKE_GPT2 = PreTokenizer((_GPT2,))
_LIKE_LLAMA3 = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_LIKE_QWEN2 = PreTokenizer((_QWEN2,))
_LIKE_GPT4O = PreTokenizer((_GPT4O,))
_LIKE_DEEPSEEK3 = PreTokenizer(_DEEPSEEK3)
_LIKE_BAILING = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_LIKE_BLOOM = PreTokenizer((_PUNCTUATION,))
_LIKE_GLM = PreTokenizer((_LLAMA3,))
_LIKE_TINY_AYA = PreTokenizer((_GROUPS_OF_THREE, _GPT4O))
_LIKE_GEMMA4 = PreTokenizer((_NEWLINES,), adds_bos=True, marks_spaces=True)

# llama.cpp's name -> pre-tokenizer. Of its names "kimi-k2", which merges by rank without a list of merges, and
# "whitespace", of embedding models, are missing.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat"), _LIKE_GPT2),
    **dict.fromkeys(("a.x-4.0", "mellum", "modern-bert", "exaone4", "jais", "trillion"), _LIKE_GPT2),
    **dict.fromkeys(("granite-docling", "jina-v1-en", "jina-v2-code", "roberta-bpe"), _LIKE_GPT2),
    **dict.fromkeys(("mpt", "olmo"), PreTokenizer((_GPT2,), normal_form=True)),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell", "exaone"), _DIGITS_THEN_GPT2),
    **dict.fromkeys(("minerva-7b", "mellum2"), _DIGITS_THEN_GPT2),
    "command-r": PreTokenizer((r"\p{N}", _GPT2), normal_form=True),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"), _LIKE_LLAMA3),
    **dict.fromkeys(("midm-2.0", "lfm2", "jina-v5-nano"), _LIKE_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _LIKE_GLM),
    **dict.fromkeys(("glm4", "glm5"), dataclasses.replace(_LIKE_GLM, whole_words=True)),
    "jais-2": PreTokenizer(
        (_ENDINGS + _WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _SPACES,),
    ),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _ENDINGS + _WORDS + r"|\p{N}+" + _REST), whole_words=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2"), PreTokenizer((_QWEN2,), normal_form=True)),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "megrez", "grok-2"), _LIKE_QWEN2),
    "qwen35": PreTokenizer((_QWEN35,)),
    "ufakzeka": PreTokenizer((_WORDS[1:] + r"|\p{N}" + _REST,)),
    "laguna": PreTokenizer((_NEWLINES, _QWEN2)),
    "seed-coder": PreTokenizer(
        (_ENDINGS + _WORDS + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
    ),
    "exaone-moe": PreTokenizer(
        (
            _ENDINGS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _LIKE_BAILING),
    "tekken": PreTokenizer((_cased("", r"|\p{N}"),), whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _LIKE_GPT4O),
    "granite-embed-multi-97m": dataclasses.replace(_LIKE_GPT4O, whole_words=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _LIKE_TINY_AYA),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", _LATIN, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _LIKE_DEEPSEEK3),
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", _CJK, _MARKED + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "youtu": PreTokenizer(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK,
            _cased(_ENDINGS + "?", r"|\p{N}"),
        ),
        whole_words=True,
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _LIKE_BLOOM),
    "viking": PreTokenizer((_PUNCTUATION, r"\p{N}")),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
    "afmoe": PreTokenizer(
        (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _MARKED + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    ),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _LIKE_GEMMA4),
    "sarvam-moe": PreTokenizer((_NEWLINES,), marks_spaces=True),
}
