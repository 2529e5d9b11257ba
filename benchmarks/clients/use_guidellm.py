"""guidellm, which measures a server."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from calls import QUESTION, given, named, report

url, model = given()


def _run(kind: str) -> str:
    """Measures five seconds. Raises RuntimeError with the last line that was printed, AssertionError for no answer."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, result = Path(folder, "prompts.jsonl"), Path(folder, "result.json")
        prompts.write_text(
            "".join(json.dumps({"prompt": QUESTION, "output_tokens_count": 16}) + "\n" for _ in range(64))
        )
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
        command += ["--backend", f"kind=openai_http,target={url},model={model},request_format={kind}"]
        command += ["--data", f"kind=json_file,path={prompts}", "--profile", "kind=concurrent,streams=2"]
        command += ["--constraint", "kind=max_duration,seconds=5", "--output", f"kind=json,path={result}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0 or not result.exists():
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        totals = json.loads(result.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0, f"{totals['errored']} of {totals['total']} requests failed"
    assert totals["successful"] > 0, "no request succeeded"
    return f"{totals['successful']} requests"


def chat() -> str:
    return _run("/v1/chat/completions")


def completion() -> str:
    return _run("/v1/completions")


report(named(chat, completion))
