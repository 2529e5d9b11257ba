"""Finding a model's family by the model_type in its config.json."""

from twotower.checkpoints.families import latent, layer_norm, llama, mixture, older, post_norm
from twotower.checkpoints.families.family import Family, Settings

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *post_norm.FAMILIES,
    *layer_norm.FAMILIES,
    *older.FAMILIES,
    *mixture.FAMILIES,
    *latent.FAMILIES,
)

# Families that are asked for and can't be had: what our towers lack.
_LACKING = {
    "mamba": "Mamba-1 layers",
    "rwkv": "RWKV layers",
    "bloom": "ALiBi positions",
    "mpt": "ALiBi positions",
    "phi": "a head with a bias",
    "gptj": "a head with a bias",
    "codegen": "a head with a bias",
    "t5": "encoders",
    "phimoe": "a router that drops experts far below the best (SparseMixer)",
}


def find_family(raw: Settings) -> Family:
    """The family of a config.json. Raises ValueError for one that is not declared, which says how to declare it."""
    model_type = raw.get("model_type")
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
