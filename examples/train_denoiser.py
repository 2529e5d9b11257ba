"""Train the denoiser of a small model on your own texts, and write the checkpoint.

    python examples/train_denoiser.py --steps 200 --texts FOLDER

Only the denoiser learns: the context tower stays as it is, so `ar` and `verified` write what they wrote before. From
an autoregressive model of your own, make the two towers first: `twotower.init(backbone, out)`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import twotower

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--texts", type=Path, help="a folder of .txt files; left out, a few lines made here")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()), help="a folder for corpus, state, checkpoint")
options = parser.parse_args()

texts = options.texts
if texts is None:
    texts = options.out / "texts"
    texts.mkdir()
    lines = [f"copy: salt red north {n} -> salt red north {n}\n\n" for n in range(400)]
    (texts / "lines.txt").write_text("".join(lines), encoding="utf-8")

# A corpus is rows of tokens on disk; the command that writes it reads .md, .jsonl and .parquet files, too.
corpus = options.out / "corpus"
subprocess.run([sys.executable, "-m", "twotower", "tokenize", "hybrid", texts, corpus, "--length", "64"], check=True)

# Training needs plain float32 weights, not those packed for inference.
model = twotower.load("hybrid", dtype="float32", pack=False)
config = twotower.TrainConfig(steps=options.steps, batch_size=4, learning_rate=3e-4, warmup_steps=2, decay_steps=0)


def report(step: twotower.StepReport) -> None:
    """Prints a line for every fifth step."""
    if step.step % 5 == 0:
        print(f"step {step.step:4}  loss {step.loss:.3f}")


# A call with the same `out` resumes after an interruption. `denoising=` takes the objective's settings.
twotower.train(model, corpus, options.out / "run", config, report=report)
twotower.save(model, options.out / "checkpoint")

trained = twotower.load(options.out / "checkpoint")
params = twotower.SamplingParams(mode="diffusion", max_new_tokens=16, stop=("\n",))
[result] = twotower.generate(trained, ["copy: salt red north 7 ->"], params)
print(f"it writes {result.text!r} in {result.stats.denoiser_calls} calls of the denoiser")
