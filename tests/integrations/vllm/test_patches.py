"""What the plugin changes in vLLM, and what it leaves as it was."""

import importlib.util
import os
from types import SimpleNamespace

import pytest

from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
DRAFTS = {"method": "custom_class", "model": DRAFTER}
TWO_TOWERS = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 32,
    "hidden_size": 8,
    "hybrid_override_pattern": "-",
    "intermediate_size": 8,
}


@pytest.fixture
def write(tmp_path):
    """write(config): a directory with this config.json."""
    import json

    def one(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return one


def test_another_vllm_refuses_two_towers_and_nothing_else(write, monkeypatch) -> None:
    from transformers import AutoConfig, NemotronHConfig

    from twotower.integrations.vllm import reader, register

    register()
    register()
    assert AutoConfig.from_pretrained(write(TWO_TOWERS)).architectures == ["TwoTowerTransformerForCausalLM"]
    monkeypatch.setattr(reader, "installed", lambda: "0.33.0")
    with pytest.raises(ValueError, match=r"vLLM is 0.33.0, must be at least 0.32 and below 0.33"):
        AutoConfig.from_pretrained(write(TWO_TOWERS))
    other = AutoConfig.from_pretrained(write(TWO_TOWERS | {"architectures": ["NemotronHForCausalLM"]}))
    assert type(other) is NemotronHConfig
    assert other.architectures == ["NemotronHForCausalLM"]


def test_a_tower_that_vllm_cant_compute_is_refused_when_its_engine_starts(write) -> None:
    from vllm import LLM

    with pytest.raises(ValueError, match=r"logit_softcap is 30\.0, must be None; serve it with twotower serve"):
        LLM(str(write(TWO_TOWERS | {"logit_softcap": 30.0})), skip_tokenizer_init=True)


def test_a_server_whose_settings_cant_be_is_refused_when_its_engine_starts(engine) -> None:
    with pytest.raises(ValueError, match="mode is 'verified', must be ar on this server"):
        engine("llama", additional_config={"twotower": {"mode": "verified"}})


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("llama", {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, "the denoiser needs --kv-cache-dtype auto"),
        (
            "llama",
            {"speculative_config": DRAFTS | {"num_speculative_tokens": 4}},
            "another for a checkpoint without",
        ),
    ],
)
def test_a_server_that_cant_be_is_refused_before_anything_starts(name, arguments, words, engine, monkeypatch) -> None:
    def started(*given: object, **more: object) -> None:
        pytest.fail("an engine has started")

    monkeypatch.setattr("vllm.v1.engine.core.EngineCore.__init__", started)
    settings = {"denoiser": True} | ({"drafter": "ngram"} if "speculative_config" in arguments else {})
    with pytest.raises(ValueError, match=words):
        engine(name, additional_config={"twotower": settings}, **arguments)


def test_what_the_denoiser_needs_is_chosen_where_nobody_has(engine, monkeypatch) -> None:
    """As on a GPU, where vLLM would choose the second runner and a scheduler that runs ahead."""
    from twotower.integrations.vllm.server import RUNNER, SCHEDULER, settle_denoiser

    def settled(
        *, denoiser: bool = True, ahead: bool | None = None, drafts: object = None, second: bool = False
    ) -> tuple[bool | None, str | None]:
        config = SimpleNamespace(
            additional_config={"twotower": {"denoiser": denoiser}},
            speculative_config=drafts,
            scheduler_config=SimpleNamespace(async_scheduling=ahead, scheduler_cls=None),
            use_v2_model_runner=second,
        )
        settle_denoiser(config)
        return config.scheduler_config.async_scheduling, config.scheduler_config.scheduler_cls

    monkeypatch.delenv(RUNNER, raising=False)
    assert settled(denoiser=False, second=True) == (None, None)
    assert settled() == (False, None)
    assert settled(second=True) == (False, SCHEDULER)
    assert settled(ahead=True) == (True, None)  # and is refused when the server is checked
    assert RUNNER not in os.environ
    drafts = SimpleNamespace(model="ngram")
    assert settled(drafts=drafts) == (False, None)
    assert os.environ[RUNNER] == "0"
    monkeypatch.setenv(RUNNER, "1")
    assert settled(drafts=drafts, second=True) == (False, SCHEDULER)  # the same
    assert os.environ[RUNNER] == "1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler_config": {"scheduler_cls": "another.Scheduler"}}, "the denoiser needs no --scheduler-cls, or two"),
        ({"speculative_config": {"model": "ngram"}}, "the denoiser needs VLLM_USE_V2_MODEL_RUNNER=0 in the environ"),
        ({"parallel_config": {"use_ubatching": True}}, "the denoiser needs no --enable-dbo"),
        ({"parallel_config": {"enable_batch_sharded_sampling": True}}, "the denoiser needs no batch-sharded sampling"),
    ],
)
def test_what_the_second_runner_cant_do_beside_blocks_is_refused(change, words) -> None:
    from twotower.integrations.vllm.server import SCHEDULER, check_denoiser

    parallel = ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size")
    settings: dict[str, dict[str, object] | None] = {
        "model_config": {"is_hybrid": False, "enable_prompt_embeds": False, "model": "nowhere"},
        "parallel_config": dict.fromkeys((*parallel, "prefill_context_parallel_size"), 1)
        | {"enable_batch_sharded_sampling": False, "use_ubatching": False},
        "cache_config": {"cache_dtype": "auto", "mamba_cache_mode": "none"},
        "scheduler_config": {"async_scheduling": False, "scheduler_cls": SCHEDULER},
        "speculative_config": None,
    }

    def config(**changed: dict[str, object]) -> SimpleNamespace:
        parts = {name: (settings[name] or {}) | changed.get(name, {}) for name in settings}
        found = {name: SimpleNamespace(**part) if part else None for name, part in parts.items()}
        return SimpleNamespace(**found, use_v2_model_runner=True)

    check_denoiser(config())
    with pytest.raises(ValueError, match=words):
        check_denoiser(config(**change))
