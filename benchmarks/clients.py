"""Runs the clients that people use against a server, each unmodified and from its own installation.

    python benchmarks/clients.py [--environments FOLDER] [--model stories] [--only openai …] [--url URL]

Installs what is missing with pip and npm into a folder for each client, which stays there for the next time. Starts
`twotower serve` on a free port, unless there is an address, runs the scripts of clients/ one after the other, and
prints a Markdown table of client, version, call and result. A result is what came back, cut, or the first line of the
error. With an error the command ends with 1.

The answers of the small models say nothing: what is shown is that each client gets what it can read. Calls of tools are
forced by `tool_choice`, or the call's name says that they are left to the model. The stories model has learnt 256
positions, into which the schemas of the tools don't fit, so it is served with --max-context 1024.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).with_name("clients")
SECONDS = 600  # most that a client's calls take


class Client(NamedTuple):
    """A script of clients/ and the packages that it needs, of which the first one's version is shown.

    One without packages runs in this Python.
    """

    script: str
    packages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.packages[0].partition("=")[0] if self.packages else "bodies"

    @property
    def is_npm(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = (
    Client("send_bodies.py"),
    Client("use_openai.py", ("openai",)),
    Client("use_openai.mjs", ("openai", "zod")),
    Client("use_ai.mjs", ("ai", "@ai-sdk/openai-compatible", "zod")),
    Client("use_langchain.py", ("langchain-openai",)),
    Client("use_pydantic_ai.py", ("pydantic-ai-slim[openai]",)),
    Client("use_instructor.py", ("instructor",)),
    Client("use_litellm.py", ("litellm",)),
    Client("use_llama_index.py", ("llama-index-llms-openai-like",)),
    Client("use_outlines.py", ("outlines", "openai")),
    Client("use_llm.py", ("llm",)),
    Client("use_anthropic.py", ("anthropic",)),
    Client("use_guidellm.py", ("guidellm==0.8.*",)),
)


def command_of(client: Client, folder: Path) -> list[str]:
    """Installs a client into a folder, where it isn't yet, and returns what runs its script."""
    script = SCRIPTS / client.script
    if not client.packages:
        return [sys.executable, "-P", str(script)]
    done = folder / "installed"
    if client.is_npm:
        folder.mkdir(parents=True, exist_ok=True)
        if not done.exists():
            (folder / "package.json").write_text("{}")
            command = ["npm", "install", "--no-audit", "--no-fund", *client.packages]
            subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)
        for source in SCRIPTS.glob("*.mjs"):  # Node looks for packages beside the script
            shutil.copy(source, folder)
        command = ["node", client.script]
    else:
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(folder / "bin/pip"), "install", "-q", *client.packages], check=True)
        command = [str((folder / "bin/python").absolute()), "-P", str(script)]
    done.touch()
    return command


def version_of(client: Client, folder: Path) -> str:
    if not client.packages:
        return ""
    name = client.name.partition("[")[0]
    if client.is_npm:
        return json.loads((folder / "node_modules" / name / "package.json").read_text())["version"]
    code = f"import importlib.metadata; print(importlib.metadata.version({name!r}))"
    return subprocess.run(
        [folder / "bin/python", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(command: list[str], folder: Path, url: str, model: str) -> Iterator[tuple[str, str, bool]]:
    """Each call's name, its result and whether it is one."""
    # A script finds calls.py beside it in spite of -P, which keeps everything else of this checkout away.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OPENAI", "VIRTUAL"))
    }
    environment["PYTHONPATH"] = str(SCRIPTS)
    if folder.exists():
        environment["PATH"] = f"{(folder / 'bin').absolute()}{os.pathsep}{environment['PATH']}"
    place = folder if folder.exists() else None
    done = subprocess.run(
        [*command, url, model], cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    for line in done.stdout.splitlines():
        if line.startswith('{"call"'):
            call = json.loads(line)
            yield call["call"], call.get("result") or call["error"], "result" in call
    if done.returncode != 0:
        yield "the script", (done.stderr.strip().splitlines() or ["it failed"])[-1], False


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """The address of a server that runs until left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "twotower", "serve", model, "--max-context", "1024", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while not _answers(f"{url}/health"):
                if server.poll() is not None:
                    sys.exit(f"`{' '.join(command)}` ended with {server.returncode}; run it to see why")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kept = Path.home() / ".cache" / "twotower-clients"
    parser.add_argument("--environments", type=Path, default=kept, help="a folder for the clients (%(default)s)")
    parser.add_argument("--model", default="stories", help="what to serve, and the model's name in requests")
    parser.add_argument("--url", help="a server that runs already, without /v1")
    names = sorted({client.name for client in CLIENTS})
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    given = parser.parse_args()
    failed = 0
    with contextlib.nullcontext(given.url) if given.url else serving(given.model) as url:
        print("| client | version | call | result |\n|---|---|---|---|", flush=True)
        for client in CLIENTS:
            if client.name not in given.only:
                continue
            folder = given.environments / Path(client.script).name.removeprefix("use_").replace(".", "-")
            command = command_of(client, folder)
            version = version_of(client, folder)
            shown = f"{client.name} (npm)" if client.is_npm else client.name
            for call, result, good in run(command, folder, url.rstrip("/"), given.model):
                cell = (result if good else f"**{result}**").replace("|", "\\|")
                print(f"| {shown} | {version} | {call} | {cell} |", flush=True)
                failed += not good
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
