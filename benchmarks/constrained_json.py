"""Counts how many texts are valid under random JSON schemas, in every mode.

python benchmarks/constrained_json.py              one JSON line per mode; needs twotower[guide] and jsonschema-rs
"""

import argparse
import json
import random
from typing import Any

import jsonschema_rs

import twotower
from twotower.decoding.modes import MODES

_WORDS = ["name", "age", "best friend", "Größe", "happy", "🎈"]


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A random schema whose texts are of bounded length, so that all of them end."""
    kind = rng.choice(["object", "array", "either"]) if depth else "simple"
    if kind == "array":
        least = rng.randrange(0, 3)
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == "either":
        return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "object":
        names = rng.sample(_WORDS, rng.randrange(1, 5))
        required = [name for name in names if rng.random() < 0.7]
        properties = {name: schema(rng, rng.randrange(depth)) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    low = rng.randrange(-1000, 1000)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(2000)},
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.25},
            {"type": "string", "minLength": 1, "maxLength": rng.randrange(1, 30)},
            {"type": "string", "pattern": "^(cat|dog)( and (cat|dog)){0,3}$"},
            {"type": "string", "format": "date"},
            {"enum": rng.sample(["red", "blue", 1, 2.5, None, True, ["a", {}]], rng.randrange(1, 7))},
            {"const": {"a": [1, None]}},
            {"type": ["boolean", "null"]},
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    schemas = [schema(random.Random(options.seed + i), 3) for i in range(options.schemas)]
    model = twotower.load()
    engine = twotower.Engine(model, twotower.EngineConfig(max_num_requests=16))
    for mode in (*MODES, "auto"):
        params = [
            twotower.SamplingParams(
                mode=mode,
                max_new_tokens=1000,
                temperature=1.0,
                seed=i,
                json_schema=json.dumps(s),
                past_positions=True,
            )
            for i, s in enumerate(schemas)
        ]
        done = engine.generate(["Once upon a time there was a form to fill in:\n"] * len(params), params)
        valid = sum(_is_valid(d.text or "", s) for d, s in zip(done, schemas, strict=True))
        ended = sum(d.finish_reason == "stop" for d in done)
        tokens = sum(d.stats.num_tokens for d in done)
        calls = sum(d.stats.context_calls for d in done)
        drafts = sum(d.stats.denoiser_calls for d in done)
        line = {"mode": mode, "schemas": len(schemas), "ended": ended, "valid": valid, "tokens": tokens}
        print(json.dumps(line | {"denoiser_calls": drafts, "context_calls": calls, "seed": options.seed}), flush=True)


def _is_valid(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return bool(jsonschema_rs.is_valid(wanted, json.loads(text)))
    except json.JSONDecodeError:
        return False


if __name__ == "__main__":
    main()
