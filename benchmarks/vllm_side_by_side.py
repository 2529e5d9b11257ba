"""Times plain vLLM, vLLM with this package's plugin, and this package's own engine, on one machine, in turns.

    .venv-vllm/bin/python benchmarks/vllm_side_by_side.py [--only stories …] [--rounds 7] [--new-tokens 64] [--bind 0-1]

Needs an environment with vLLM, as `make test-vllm` makes it. Prints one JSON line. For each model:

- `vllm ar`: the context tower alone, written as an ordinary checkpoint that vLLM knows (Llama, Nemotron-H), in a vLLM
  that may load no plugin. The hybrid has none: vLLM's build for CPUs lacks its experts.
- `plugin ar`: the two-tower checkpoint with the plugin. `plugin verified` and `plugin diffusion`: by servers that have
  the drafter and the denoiser. `plugin with all`: of the hybrid by a server that has both, so that the denoiser drafts.
- `twotower ar`, `twotower verified`, `twotower diffusion`: `twotower.Engine`.

Each with 1, 4 and 16 sequences at once: `tokens_per_second` are medians over the rounds; `ratios` are of two runs in
one round, with the same prompts: the lower quartile, the median and the upper quartile. Within a round the contenders
take turns, in another order each time; the processes of those whose turn it isn't are stopped. Greedy, past every end,
in the same dtype. Threads, compilation, prefix cache, drafters and settings of blocks are what each has by default; OMP
and vLLM settings of the environment are dropped. vLLM leaves a core to its scheduler: `--bind` is its
VLLM_CPU_OMP_THREADS_BIND, and `threads` says how many computed. 1 GiB of keys and states for each.

The models: the two that come along; `llama`, a random one of SmolLM2-135M's shape; and `recurrent`, a random one of the
hybrid's shape without experts, which plain vLLM has. Of random models only `ar` is timed: what a draft or a denoising
step is worth follows from what was learnt.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import save_file

import twotower
from twotower import TwoTower, TwoTowerConfig
from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.tokenizer_file import load_tokenizer
from twotower.integrations.vllm.settings import DRAFTER
from twotower.origin import command, commit, cpu_model

DATA = Path(twotower.__file__).parent / "data"
SEQUENCES = (1, 4, 16)
DENOISER = {"additional_config": {"twotower": {"denoiser": True}}}
DRAFTS = {"speculative_config": {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 16}}
SMOLLM2 = TwoTowerConfig(
    vocab_size=49152,
    hidden_size=576,
    pattern="*-" * 30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    use_rope=True,
    intermediate_size=1536,
    gated_mlp=True,
    mlp_hidden_act="silu",
    tie_word_embeddings=True,
)


class Contender(NamedTuple):
    """An engine of one kind and the modes that it is timed in; `options` are vllm.LLM's, and `name` tells engines of
    one kind apart that are timed in the same mode."""

    kind: str
    modes: tuple[str, ...]
    options: Mapping[str, Any] = {}
    name: str = ""


PLAIN, PLUGIN, OURS = "vllm", "plugin", "twotower"
AR = (Contender(PLAIN, ("ar",)), Contender(PLUGIN, ("ar",)))
MODELS: dict[str, tuple[Contender, ...]] = {
    "stories": (
        *AR,
        Contender(PLUGIN, ("verified", "diffusion"), DENOISER | DRAFTS),
        Contender(OURS, ("ar", "verified", "diffusion")),
    ),
    "hybrid": (
        Contender(PLUGIN, ("ar",)),
        Contender(PLUGIN, ("verified",), DRAFTS),
        Contender(PLUGIN, ("diffusion",), DENOISER),
        Contender(PLUGIN, ("ar", "verified", "diffusion"), DENOISER | DRAFTS, f"{PLUGIN} with all"),
        Contender(OURS, ("ar", "verified", "diffusion")),
    ),
    "recurrent": (*AR, Contender(OURS, ("ar",))),
    "llama": (*AR, Contender(OURS, ("ar",))),
}


def random_checkpoint(config: TwoTowerConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes a model whose random weights keep activations near 1."""
    torch.manual_seed(0)
    model = TwoTower(config, dtype=dtype)
    for name, tensor in model.released_tensors().items():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.fill_(1.0)
        elif name.endswith("A_log"):
            tensor.zero_()
        else:
            tensor.copy_(torch.randn(tensor.shape) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.02))
    twotower.save(model, folder)


def two_towers(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """The checkpoint of a model, written to `folder` if it is random."""
    if (DATA / name).is_dir():
        return DATA / name
    config = SMOLLM2
    if name == "recurrent":
        hybrid = read_config(DATA / "hybrid")
        config = dataclasses.replace(hybrid, pattern=hybrid.pattern.replace("E", "-"))
    random_checkpoint(config, folder, dtype)
    return folder


def plain_checkpoint(source: Path, folder: Path) -> None:
    """Writes a checkpoint's context tower as a Llama or Nemotron-H model."""
    config = read_config(source)
    tensors = twotower.load(source, pack=False).released_tensors()
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith("context_")}
    common = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "max_position_embeddings": json.loads((source / "config.json").read_text()).get(
            "max_position_embeddings", 4096
        ),
    }
    if "M" in config.pattern:
        values = json.loads((source / "config.json").read_text()) | common
        values |= {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
        names = {
            name: name.replace("context_tower.", "backbone.").replace("context_lm_head", "lm_head") for name in tower
        }
    else:
        values = common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": config.num_layers // 2,
            "hidden_act": "silu",
            "rms_norm_eps": config.layer_norm_epsilon,
            "rope_theta": config.rope_theta,
        }
        names = {name: _llama_name(name) for name in tower}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file({names[name]: tensor.contiguous() for name, tensor in tower.items()}, folder / "model.safetensors")
    if (source / "tokenizer.json").exists():
        shutil.copy(source / "tokenizer.json", folder)


def _llama_name(name: str) -> str:
    """The name in a Llama of a tensor of a tower whose layers are attention and MLP in turns."""
    found = re.fullmatch(r"context_tower\.layers\.(\d+)\.(norm|mixer\.(\w+))\.weight", name)
    if found is None:
        table = {"embeddings": "model.embed_tokens", "norm_f": "model.norm", "context_lm_head": "lm_head"}
        return f"{table[name.removesuffix('.weight').removeprefix('context_tower.')]}.weight"
    layer, is_mlp = divmod(int(found[1]), 2)
    if found[2] == "norm":
        part = "post_attention_layernorm" if is_mlp else "input_layernorm"
    else:
        part = f"{'mlp' if is_mlp else 'self_attn'}.{found[3]}"
    return f"model.layers.{layer}.{part}.weight"


def prompts_of(name: str, folder: Path) -> Iterator[list[int]]:
    """Prompts without end, each another: of what the model has learnt, or random tokens."""
    if name == "stories":
        known = json.loads(Path(__file__).with_name("stories_prompts.json").read_text())
    elif name == "hybrid":
        tokenizer = load_tokenizer(folder, read_config(folder).vocab_size)
        assert tokenizer is not None
        lines = (DATA / "tasks" / "lists.jsonl").read_text().splitlines()
        known = [list(tokenizer.encode(json.loads(line)["prompt"]).ids) for line in lines]
    else:
        rng = random.Random(0)
        known = [[rng.randrange(4, 1000) for _ in range(32)] for _ in range(50)]
    return itertools.cycle(known)


class Worker:
    """A process with one engine, which runs only while it is asked."""

    def __init__(self, contender: Contender, folder: Path, dtype: str, bind: str, log: Path) -> None:
        self.log = log
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "GOMP_", "VLLM_"))}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": bind}
        environment["VLLM_PLUGINS"] = "twotower" if contender.kind == PLUGIN else ""
        order = json.dumps([contender.kind, str(folder), dtype, contender.options])
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--worker", order],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                start_new_session=True,  # vLLM's own processes are stopped and ended with it
            )  # fmt: skip
        self.threads = self._answer()
        # Of vLLM's processes another one computes.
        bound = re.search(r"local_rank=0, core ids=\[(.*)\]", log.read_text())
        if bound is not None:
            self.threads = len(bound[1].split(","))
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def seconds(self, mode: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """How long all prompts take, at once."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(json.dumps([mode, prompts, new_tokens]), file=self._process.stdin, flush=True)
        seconds = float(self._answer())
        self._signal(signal.SIGSTOP)
        return seconds

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended; its log:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def work(kind: str, folder: str, dtype: str, options: dict[str, Any]) -> None:
    """A worker: starts an engine and writes how many threads it has, then for each line of orders the seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to both
    run = _our_engine(folder, dtype) if kind == OURS else _vllm(folder, dtype, options)
    print(json.dumps(torch.get_num_threads()), file=answers, flush=True)
    for line in sys.stdin:
        mode, prompts, new_tokens = json.loads(line)
        began = time.perf_counter()
        written = run(mode, prompts, new_tokens)
        seconds = time.perf_counter() - began
        assert written == new_tokens * len(prompts)
        print(json.dumps(seconds), file=answers, flush=True)


def _our_engine(folder: str, dtype: str) -> Any:
    engine = twotower.Engine(twotower.load(folder, dtype=dtype), twotower.EngineConfig(state_bytes=1 << 30))

    def run(mode: Any, prompts: list[list[int]], new_tokens: int) -> int:
        params = twotower.SamplingParams(mode=mode, max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
        return sum(len(result.token_ids) for result in engine.generate(prompts, params))

    return run


def _vllm(folder: str, dtype: str, options: dict[str, Any]) -> Any:
    from vllm import LLM, SamplingParams

    bare = not (Path(folder) / "tokenizer.json").exists()
    engine = LLM(folder, dtype=dtype, skip_tokenizer_init=bare, **options)

    def run(mode: str, prompts: list[list[int]], new_tokens: int) -> int:
        chosen = {"mode": mode} if os.environ["VLLM_PLUGINS"] else None
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=not bare, extra_args=chosen
        )
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in found)

    return run


class Run(NamedTuple):
    """What one contender did in one round."""

    name: str  # such as "plugin ar"
    sequences: int
    tokens_per_second: float


def compare(
    name: str, workers: Sequence[tuple[Contender, Worker]], prompts: Iterator[list[int]], args: Any
) -> list[list[Run]]:
    """The rounds of a model, without the first one, in which each engine grows warm."""
    turns = [
        (f"{contender.name or contender.kind} {mode}", worker, mode)
        for contender, worker in workers
        for mode in contender.modes
    ]
    rounds = []
    for number in range(args.rounds + 1):
        found = []
        for sequences in SEQUENCES:
            some = list(itertools.islice(prompts, sequences))
            first = number % len(turns)
            for run_name, worker, mode in turns[first:] + turns[:first]:
                seconds = worker.seconds(mode, some, args.new_tokens)
                found.append(Run(run_name, sequences, sequences * args.new_tokens / seconds))
        print(f"{name}, round {number} of {args.rounds}", file=sys.stderr, flush=True)
        rounds.append(found)
    return rounds[1:]


def summary(rounds: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """Medians of speeds, and quartiles of ratios within rounds: of everything to the `ar` of plain vLLM or, where there
    is none, of the plugin, and of our engine to the plugin in each mode."""
    names = list(dict.fromkeys(run.name for run in rounds[0]))
    base = f"{PLAIN} ar" if f"{PLAIN} ar" in names else f"{PLUGIN} ar"
    pairs = [(name, base) for name in names if name != base]
    pairs += [(f"{OURS} {mode}", f"{PLUGIN} {mode}") for mode in ("ar", "verified", "diffusion")]
    pairs = [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(names)]
    speed = [{(run.name, run.sequences): run.tokens_per_second for run in found} for found in rounds]
    return {
        "tokens_per_second": {
            name: {n: round(statistics.median(one[name, n] for one in speed), 1) for n in SEQUENCES} for name in names
        },
        "ratios": {
            f"{above} / {below}": {n: _quartiles([one[above, n] / one[below, n] for one in speed]) for n in SEQUENCES}
            for above, below in pairs
        },
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4, method="inclusive")]


def measure(name: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """A model's results."""
    folder = two_towers(name, place / "two_towers", getattr(torch, args.dtype))
    contenders = MODELS[name]
    if contenders[0].kind == PLAIN:
        plain_checkpoint(folder, place / "plain")
    with contextlib.ExitStack() as running:
        workers = []
        for number, contender in enumerate(contenders):
            where = place / "plain" if contender.kind == PLAIN else folder
            worker = Worker(contender, where, args.dtype, args.bind, place / f"{number}.log")
            workers.append((contender, running.enter_context(worker)))
            print(f"{name}, {contender.kind} is ready", file=sys.stderr, flush=True)
        rounds = compare(name, workers, prompts_of(name, folder), args)
    threads = {f"{c.name or c.kind} {mode}": worker.threads for c, worker in workers for mode in c.modes}
    return {"threads": threads, **summary(rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="beside one to grow warm")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--bind", default="auto")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(*json.loads(args.worker))
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}, must be at least 2, for quartiles")
    found = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as place:
            found[name] = measure(name, args, Path(place))
    origin = {"command": command(), "commit": commit(), "cpu": cpu_model(), "cpus": os.cpu_count()}
    versions = {"torch": torch.__version__, "vllm": metadata.version("vllm")}
    settings = {"dtype": args.dtype, "rounds": args.rounds, "new_tokens": args.new_tokens, "bind": args.bind}
    print(json.dumps({"benchmark": "vllm_side_by_side", **origin, **versions, **settings, "models": found}))
    return None


if __name__ == "__main__":
    main()
