"""Breaks a server in every way that an operator meets, and tells what its clients saw, what the operator saw, and after
how long all was well again.

    python benchmarks/faults.py [--source CHECKOUT] [--only NAME …]

Starts a server of the stories model for each fault, on this machine, and prints a Markdown table. `--source` is another
checkout, for a table of how it was before.
"""

import argparse
import collections
import concurrent.futures
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from service.process import Server, free_port

PROMPT = "Once upon a time"
GIVE_UP = 20.0  # seconds after which what isn't well again is said not to be


class Seen(NamedTuple):
    """What a fault did; `well_after` are seconds, None for never."""

    client: str
    operator: str
    well_after: float | None


class Bench:
    """Where the servers of a run come from."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self._folder = folder
        self._num = 0

    def server(self, *options: str, prefix: str = "", faulty: bool = False, port: int | None = None) -> Server:
        self._num += 1
        log = self._folder / f"{self._num}.log"
        log.write_bytes(b"")
        return Server(self.source, log, "stories", *options, prefix=prefix, faulty=faulty, port=port)


def ask(server: Server, *, stream: bool = False, seconds: float = 60.0, **fields: object) -> str:
    """What a client sees of a request, in a few words."""
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "stream": stream, "ignore_eos": True, **fields}
    try:
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=seconds, trust_env=False)
    except httpx.ConnectError:
        return "connection refused"
    except httpx.TimeoutException:
        return f"nothing for {seconds:.0f} s"
    except httpx.HTTPError as error:
        return f"connection cut ({type(error).__name__})"
    return told(response, stream=stream)


def told(response: httpx.Response, *, stream: bool) -> str:
    if response.status_code != 200:
        try:
            return f"{response.status_code} “{response.json()['error']['message'][:70]}”"
        except (KeyError, TypeError, json.JSONDecodeError):
            return f"{response.status_code} {response.text[:40]!r}"
    if not stream:
        return "200, whole" if response.content else "200, empty"
    if "data: [DONE]" in response.text:
        return "stream, whole"
    error = re.search(r'"error":\{"message":"([^"]{0,70})', response.text)
    if error:
        return f"error event “{error[1]}”"
    return "stream without an end" if response.text else "200, empty"


def several(server: Server, count: int, **fields: object) -> "list[concurrent.futures.Future[str]]":
    pool = concurrent.futures.ThreadPoolExecutor(count)
    return [pool.submit(ask, server, **fields) for _ in range(count)]


def summed(answers: "Sequence[concurrent.futures.Future[str]]") -> str:
    counts = collections.Counter(answer.result() for answer in answers)
    return "; ".join(f"{count} × {what}" for what, count in counts.most_common())


def well_again(server: Server) -> float | None:
    """Seconds until a request is answered."""
    began = time.perf_counter()
    while time.perf_counter() - began < GIVE_UP:
        if ask(server, seconds=GIVE_UP) == "200, whole":
            return round(time.perf_counter() - began, 1)
        time.sleep(0.1)
    return None


def logged(server: Server) -> str:
    """The log's errors and warnings, by message."""
    counts: collections.Counter[str] = collections.Counter()
    for line in server.log.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            counts[f"(no JSON) {line[:50]}"] += 1
            continue
        if record["level"] in ("warning", "error", "critical"):
            counts[f"{record['level']}: {record['message'][:80]}"] += 1
    return "; ".join(f"{count} × {what}" for what, count in counts.most_common(3)) or "nothing"


def out_of_memory(number: signal.Signals) -> Callable[[Bench], Seen]:
    def run(bench: Bench) -> Seen:
        with bench.server(faulty=True) as server:
            server.start()
            ask(server)
            answers = several(server, 4, stream=True, max_tokens=200) + several(server, 4, max_tokens=200)
            time.sleep(0.1)
            server.send(number)
            client = summed(answers)
            after = well_again(server)
            texts = re.findall(
                r'twotower_texts_total\{mode="\w+",outcome="(\w+)"\} ([1-9]\d*)',
                httpx.get(f"{server.url}/metrics", timeout=120, trust_env=False).text,
            )
            counted = ", ".join(f"{outcome} {count}" for outcome, count in texts)
            return Seen(client, f"{logged(server)}; counted: {counted}; process {_state(server)}", after)

    return run


def stopping(bench: Bench) -> Seen:
    options = ("--max-requests", "2", "--shutdown-seconds", "1", "--max-context", "4096")
    with bench.server(*options) as server:
        server.start()
        ask(server)
        running = several(server, 2, stream=True, max_tokens=4000, mode="ar")
        time.sleep(0.3)
        waiting = several(server, 2, stream=True) + several(server, 2)
        time.sleep(0.2)
        began = time.perf_counter()
        server.send(signal.SIGTERM)
        status = server.wait(GIVE_UP)
        took = time.perf_counter() - began
        client = f"running: {summed(running)}; waiting: {summed(waiting)}"
        return Seen(client, f"exit status {status} after {took:.1f} s; {logged(server)}", None)


def signals(first: signal.Signals, second: signal.Signals | None) -> Callable[[Bench], Seen]:
    def run(bench: Bench) -> Seen:
        with bench.server("--shutdown-seconds", "30", "--max-context", "65536", "--state-mib", "1024") as server:
            server.start()
            ask(server)
            new_tokens = 60_000 if second is not None else 400
            running = several(server, 1, stream=True, max_tokens=new_tokens, mode="ar", seconds=GIVE_UP)
            time.sleep(0.5)
            began = time.perf_counter()
            server.send(first)
            if second is not None:
                time.sleep(0.5)
                server.send(second)
            status = server.wait(GIVE_UP)
            took = time.perf_counter() - began
            ended = "runs on" if status is None else f"exit status {status} after {took:.1f} s"
            server.__exit__()
            return Seen(summed(running), ended, None)

    return run


@contextmanager
def idle(server: Server, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    opened = []
    try:
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", server.port), timeout=5)
            one.sendall(sent)
            opened.append(one)
        yield opened
    finally:
        for one in opened:
            one.close()


def few_descriptors(hard: bool) -> Callable[[Bench], Seen]:
    def run(bench: Bench) -> Seen:
        with bench.server(prefix=f"ulimit {'-n' if hard else '-Sn'} 64;") as server:
            server.start()
            ask(server)
            with httpx.Client(base_url=server.url, trust_env=False, timeout=GIVE_UP) as early:
                early.get("/health")
                with idle(server, 80):
                    cpu, size, began = server.cpu_seconds(), server.log.stat().st_size, time.perf_counter()
                    new, old = ask(server, seconds=5), _health(early)
                    time.sleep(max(0.0, 10 - (time.perf_counter() - began)))
                    cpu = (server.cpu_seconds() - cpu) / (time.perf_counter() - began)
                    size = server.log.stat().st_size - size
            client = f"80 say nothing; a new one: {new}; one from before: {old}"
            return Seen(client, f"{cpu:.0%} of a core, {size / 1e6:.2f} MB of log in 10 s", well_again(server))

    return run


def _health(client: httpx.Client) -> str:
    try:
        return str(client.get("/health").status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


def silent(bench: Bench) -> Seen:
    kinds = {
        "nothing": b"",
        "half a header": b"POST /v1/comp",
        "half a body": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 90\r\n\r\n{",
    }
    with bench.server() as server:
        server.start()
        seen = []
        for name, sent in kinds.items():
            with idle(server, 1, sent) as [one]:
                one.settimeout(90)
                began = time.perf_counter()
                try:
                    one.recv(1)
                    seen.append(f"{name}: closed after {time.perf_counter() - began:.0f} s")
                except TimeoutError:
                    seen.append(f"{name}: open after 90 s")
        return Seen("; ".join(seen), logged(server), None)


def port_in_use(bench: Bench) -> Seen:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        with bench.server(port=other.getsockname()[1]) as server:
            began = time.perf_counter()
            server.start(wait=False)
            status = server.wait(60)
            lines = server.log.read_text().splitlines()
            took = time.perf_counter() - began
            return Seen("—", f"exit status {status} after {took:.1f} s: “{lines[-1][:150]}”", None)


def loading(bench: Bench) -> Seen:
    with bench.server() as server:
        began = time.perf_counter()
        server.start(wait=False)
        seen: dict[str, float] = {}
        while (what := ask(server)) != "200, whole":
            seen.setdefault(what, time.perf_counter() - began)
        ready = time.perf_counter() - began
        client = ", then ".join(f"from {at:.1f} s: {what}" for what, at in seen.items())
        return Seen(client, logged(server), round(ready, 1))


def long_text(bench: Bench) -> Seen:
    with bench.server() as server:
        server.start()
        answer = ask(server, user="u" * 1_000_000)
        httpx.get(f"{server.url}/{'p' * 60_000}", timeout=60, trust_env=False)
        longest = max(map(len, server.log.read_text().splitlines()))
        return Seen(answer, f"longest line of the log: {longest} characters", None)


def many_scored(bench: Bench) -> Seen:
    with bench.server("--max-context", "2048", "--max-requests", "16", "--max-waiting", "256") as server:
        server.start()
        ask(server)
        before, most, state = server.memory_mb(), 0.0, 0.0
        answers = several(server, 4, prompt=[5] * 1500, n=64, logprobs=1, max_tokens=4, echo=True, seconds=300)
        while not all(answer.done() for answer in answers):
            most = max(most, server.memory_mb())
            found = re.search(
                r"^twotower_state_bytes (\S+)", httpx.get(f"{server.url}/metrics", timeout=120).text, re.MULTILINE
            )
            state = max(state, float(found[1]) if found else 0.0)
            time.sleep(0.05)
        return Seen(summed(answers), f"memory {before:.0f} → {most:.0f} MB, states {state / 1e6:.1f} MB", None)


def full_disk(bench: Bench) -> Seen:
    """The log's file may not grow beyond 8 KB."""
    with bench.server(prefix="ulimit -f 8; trap '' XFSZ;") as server:
        server.start()
        answers = [ask(server) for _ in range(100)]
        counts = collections.Counter(answers)
        client = "; ".join(f"{count} × {what}" for what, count in counts.most_common())
        return Seen(client, f"log of {server.log.stat().st_size} bytes; process {_state(server)}", well_again(server))


def _state(server: Server) -> str:
    return "runs" if server.status is None else f"ended with {server.status}"


FAULTS: dict[str, Callable[[Bench], Seen]] = {
    "out of memory in a context pass, 8 requests": out_of_memory(signal.SIGUSR1),
    "out of memory in a denoiser pass, 8 requests": out_of_memory(signal.SIGUSR2),
    "SIGTERM, 2 run for longer than allowed, 4 wait": stopping,
    "SIGHUP, one runs": signals(signal.SIGHUP, None),
    "two SIGTERM, one runs": signals(signal.SIGTERM, signal.SIGTERM),
    "64 descriptors (soft limit), 80 idle connections": few_descriptors(False),
    "64 descriptors (hard limit), 80 idle connections": few_descriptors(True),
    "silent connections": silent,
    "the port is in use": port_in_use,
    "a request while it loads": loading,
    "a user of 1 MB and a path of 60 KB": long_text,
    "4 requests of 64 texts with log-probabilities": many_scored,
    "full disk under the log": full_disk,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1], help="the checkout that is served")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="faults whose names have these words")
    given = parser.parse_args()
    commit = ["git", "-C", str(given.source), "rev-parse", "--short", "HEAD"]
    print(f"{subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip()}\n", file=sys.stderr)
    print("| fault | clients saw | the operator saw | well again after |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.source, Path(folder))
        for name, run in FAULTS.items():
            if any(words in name for words in given.only):
                seen = run(bench)
                after = "—" if seen.well_after is None else f"{seen.well_after} s"
                cells = [name, seen.client, seen.operator, after]
                print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
