"""Keeps a server under mixed load for a while, breaks it now and then, and counts what its clients saw.

    python benchmarks/soak.py [--minutes 30] [--source CHECKOUT] [--model stories] [--log soak.log]

Clients ask for greedy texts in every mode, one or four at a time, whole, in streams, with log-probabilities; some read
slowly, some go away in the middle, some send nonsense, some open connections and say nothing. Each text is compared
with what `twotower.generate` writes. Meanwhile a pass of the engine raises an out-of-memory error every so often (see
service/serve_with_faults.py), and after a sixth of the time the server is sent SIGTERM and, when it has ended, started
again, as a supervisor does.

Prints one JSON line: requests by kind and outcome, and the resident memory, open descriptors and log of each of the two
processes. Outcomes are `right`, `refused` with the reason (the queue is full, the server is stopping or not there),
`failed, told` (an error that the client could read), `dropped` by the client; and `wrong` and `lost` (a cut connection,
a stream without an end, no byte for a minute), of which there must be none: where there are, it exits with 1.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from service.load import Question, Tally, run
from service.process import Server

import twotower
from twotower.origin import commit, cpu_model

STARTS = (
    "Once upon a time",
    "One day, a little dog",
    "Lily and Tom went to the",
    "The big red bird",
    "Sam was sad. He",
)
CLIENTS = {"whole": 6, "scored": 2, "stream": 6, "slow reader": 3, "dropper": 4, "nonsense": 2, "silent": 4}


def questions(model: str) -> list[Question]:
    """Requests of every mode, and what the library answers."""
    opened = twotower.load(None if model == "stories" else model)
    found = []
    for mode in ("ar", "diffusion", "verified"):
        for place, start in enumerate(STARTS):
            prompt = " ".join([start] * (1 if place % 2 else 6))
            new = (16, 48, 96)[place % 3]
            params = twotower.SamplingParams(mode=mode, max_new_tokens=new)
            [answer] = twotower.generate(opened, [prompt], params)
            n = 4 if place == 2 else 1
            body = {"prompt": prompt, "max_tokens": new, "mode": mode, "temperature": 0, "n": n}
            found.append(Question(body, [answer.text] * n))
    return found


class Watched:
    """Readings of the running server, taken now and then."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.readings: list[tuple[float, float, int]] = []
        self._began = time.perf_counter()

    def read(self) -> None:
        now = time.perf_counter() - self._began
        self.readings.append((now, self.server.memory_mb(), self.server.num_descriptors()))

    def report(self) -> dict[str, Any]:
        at = {"start": 0, "middle": len(self.readings) // 2, "end": -1}
        return {
            "minutes": round(self.readings[-1][0] / 60, 1),
            "memory_mb": {name: self.readings[i][1] for name, i in at.items()},
            "descriptors": {name: self.readings[i][2] for name, i in at.items()},
            "most_memory_mb": max(r[1] for r in self.readings),
        }


async def soak(server: Server, asked: list[Question], minutes: float, every: float) -> dict[str, Any]:
    tally, seconds = Tally(), minutes * 60
    load = asyncio.create_task(run(server.url, asked, CLIENTS, tally, seconds))
    began = time.perf_counter()
    # The first readings are taken when everything has been used once.
    await asyncio.sleep(min(30.0, seconds / 10))
    watched = [Watched(server)]
    faults, restart = 0, None
    while time.perf_counter() - began < seconds:
        watched[-1].read()
        await asyncio.sleep(every)
        if restart is None and time.perf_counter() - began > seconds / 6:
            restart = await restarted(server, tally)
            await asyncio.sleep(min(30.0, seconds / 10))
            watched.append(Watched(server))
        else:
            server.send((signal.SIGUSR1, signal.SIGUSR2)[faults % 2])
            faults += 1
    await load
    await asyncio.sleep(2)
    watched[-1].read()
    return {
        "minutes": minutes,
        "requests": tally.total(),
        "outcomes": {name: tally.total(name) for name in sorted({outcome for _, outcome in tally.counts})},
        "by_kind": tally.table(),
        "unexpected": tally.unexpected,
        "injected_errors": faults,
        "restart": restart,
        "processes": [each.report() for each in watched],
    }


async def restarted(server: Server, tally: Tally) -> dict[str, Any]:
    """Ends the server as a supervisor does and starts it again; how long each took, in seconds."""
    began = time.perf_counter()
    tally.is_down = True
    server.send(signal.SIGTERM)
    status = await asyncio.to_thread(server.wait, 120)
    ended = time.perf_counter()
    await asyncio.to_thread(server.start)
    ready = time.perf_counter()
    await asyncio.sleep(1)  # requests that were refused just now are counted as such
    tally.is_down = False
    return {"exit_status": status, "drained": round(ended - began, 1), "ready": round(ready - ended, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=20, help="seconds between two injected errors")
    parser.add_argument("--model", default="stories")
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1], help="the checkout that is served")
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="where the server's log goes")
    given = parser.parse_args()
    asked = questions(given.model)
    given.log.write_bytes(b"")
    with Server(given.source, given.log, given.model, faulty=True) as server:
        server.start()
        found = asyncio.run(soak(server, asked, given.minutes, given.every))
        server.send(signal.SIGTERM)
        found["exit_status"] = server.wait(60)
    found["log_mb"] = round(given.log.stat().st_size / 1e6, 2)
    print(json.dumps(found | {"cpu": cpu_model(), "commit": commit(), "source": given.source.name}))
    sys.exit(1 if found["unexpected"] else 0)


if __name__ == "__main__":
    main()
