"""Finding a model's family by the model_type in its config.json."""

from collections.abc import Mapping

from twotower.checkpoints.families import (
    alibi,
    dbrx,
    delta,
    gpt,
    latent,
    layer_norm,
    llama,
    mamba,
    mamba1,
    mixture,
    older,
    post_norm,
    recurrent_gemma,
)
from twotower.checkpoints.families.family import Family, Settings

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *post_norm.FAMILIES,
    *alibi.FAMILIES,
    *gpt.FAMILIES,
    *layer_norm.FAMILIES,
    *older.FAMILIES,
    *mixture.FAMILIES,
    *latent.FAMILIES,
    *dbrx.FAMILIES,
    *mamba.FAMILIES,
    *delta.FAMILIES,
    *mamba1.FAMILIES,
    *recurrent_gemma.FAMILIES,
)

# Families that are asked for and can't be had: what our towers lack.
_LACKING = {
    "rwkv": "RWKV layers",
    "gemma3n_text": "embeddings for each layer",
    "mllama_text_model": "layers that attend to images",
    "zamba2": "layers that share their weights",
    "xglm": "positions of sines",
    "t5": "encoders",
    "phimoe": "a router that drops experts far below the best (SparseMixer)",
}


# What `text_config` may leave out where it is as in transformers' classes, so in LLaVA 1.5 and Gemma 3 4B
_SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_USUAL_SIZES = {
    "llama": (32000, 4096, 11008, 32, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "ministral3": (131072, 4096, 14336, 34, 32),
    "llama4_text": (202048, 5120, 8192, 48, 40),
    "gemma3_text": (262208, 2304, 9216, 26, 8),
}


def text_settings(raw: Settings) -> Settings:
    """The config.json of the decoder in a model that also sees or hears, whose `text_config` it is; of other models
    their own. Tokens and ties are those of the whole."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return raw
    whole = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
    given = {key: raw[key] for key in whole if raw.get(key) is not None}
    model_type = _model_type(text) or f"{_model_type(raw)}_text"
    usual = dict(zip(_SIZE_KEYS, _USUAL_SIZES.get(model_type, ()), strict=False))
    return {**usual, **text, "model_type": model_type, **given}


def find_family(raw: Settings) -> Family:
    """The family of a config.json. Raises ValueError for one that is not declared, which says how to declare it."""
    model_type = _model_type(raw)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    names = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    if model_type is None:
        problem = "config.json has no model_type, which says what family the model is of"
    elif model_type in _LACKING:
        problem = (
            f"model_type is {model_type!r}, a family that needs {_LACKING[model_type]}, which our towers don't have"
        )
    else:
        problem = f"model_type is {model_type!r}, a family that is not declared"
    raise ValueError(f"{problem}; families that are: nemotron_h, {names}; docs/families.md says how to add one")


def _model_type(raw: Settings) -> str | None:
    value = raw.get("model_type")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"config.json has model_type {value!r}, must be a text; correct it")
    return value
