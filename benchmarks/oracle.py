"""How full the oracle layer keeps a server, and what a call costs the client.

    python benchmarks/oracle.py --calls 2000 --slots 64

The server of the tests answers over a loopback socket after a time drawn from a lognormal distribution. In one run:
ours, the loop of the published scripts (a batch of as many calls as there are slots, wait for all, next batch), and
the least time in which any client could have placed the same calls one after another on the same slots (list
scheduling). Then the same calls without latency, for the client's own processor time.
"""

import argparse
import asyncio
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hf_reflect import background
from hf_reflect.journal import Journal
from hf_reflect.oracles.base import Request, Sampling
from hf_reflect.oracles.chat import ChatOracle
from hf_reflect.oracles.journaled import JournaledOracle


SERVER = Path(__file__).parent.parent / "tests" / "chaos_server.py"
Client = Callable[[ChatOracle, list[Request], int, Path], Awaitable[None]]


async def ours(oracle: ChatOracle, requests: list[Request], slots: int, folder: Path) -> None:
    """Every call through the journal, retries, pace and budget."""
    asked = JournaledOracle(oracle, Journal(folder / "journal.sqlite3"))
    await asyncio.gather(*(asked.ask(request) for request in requests))


async def batches(oracle: ChatOracle, requests: list[Request], slots: int, folder: Path) -> None:
    """A batch of calls, wait for all of them, the next batch; nothing is kept."""
    for start in range(0, len(requests), slots):
        await asyncio.gather(*(oracle.complete(request) for request in requests[start : start + slots]))


async def bare(oracle: ChatOracle, requests: list[Request], slots: int, folder: Path) -> None:
    """As many calls at once as there are slots, and nothing else."""
    semaphore = asyncio.Semaphore(slots)

    async def one(request: Request) -> None:
        async with semaphore:
            await oracle.complete(request)

    await asyncio.gather(*(one(request) for request in requests))


def measure(client: Client, calls: int, slots: int, mean: float, sigma: float) -> dict[str, Any]:
    """Runs a client against a fresh server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(SERVER), "--port-file", str(folder / "port"), "--log", str(folder / "log")]
        server = subprocess.Popen([*command, "--mean", str(mean), "--sigma", str(sigma)])
        try:
            while not (folder / "port").exists():
                time.sleep(0.05)
            oracle = ChatOracle(f"http://127.0.0.1:{(folder / 'port').read_text()}/v1", concurrency=slots)
            requests = [_request(i) for i in range(calls)]
            background.run(oracle.complete(_request(-1)))  # imports and the first connection are nobody's fault
            wall, cpu = time.monotonic(), time.process_time()
            background.run(client(oracle, requests, slots, folder))
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        finally:
            server.kill()
            server.wait()
        lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    latencies = [line["delay"] for line in lines if line["event"] == "drawn"][1:]
    assert len(latencies) == calls
    bound = list_scheduling(latencies, slots)
    times = (
        {"seconds": round(wall, 2), "bound": round(bound, 2), "times_bound": round(wall / bound, 3)} if bound else {}
    )
    return {**times, "client_ms_per_call": round(1000 * cpu / calls, 2)}


def list_scheduling(latencies: list[float], slots: int) -> float:
    """When the last of these jobs ends, each put on the slot that is free first."""
    free = [0.0] * slots
    for latency in latencies:
        heapq.heappush(free, heapq.heappop(free) + latency)
    return max(free)


def _request(number: int) -> Request:
    text = f"### Instruction\nSay {number}.\n\n### Response\nIt is {number}.\n\n[New Response]\n...\n[End]"
    return Request(({"role": "user", "content": text},), Sampling(max_tokens=64))


def main() -> None:
    """Measures all clients and prints JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--mean", type=float, default=0.5, help="of the latency, in seconds")
    parser.add_argument("--sigma", type=float, default=1.0, help="of its logarithm")
    options = parser.parse_args()
    report = {
        "command": f"python benchmarks/oracle.py --calls {options.calls} --slots {options.slots}",
        "cores": len(os.sched_getaffinity(0)),
        "latency": {"distribution": "lognormal", "mean": options.mean, "sigma": options.sigma},
    }
    for title, client in (("ours", ours), ("batch_and_wait", batches)):
        report[title] = measure(client, options.calls, options.slots, options.mean, options.sigma)
    for title, client in (("ours_no_latency", ours), ("bare_client_no_latency", bare)):
        report[title] = measure(client, options.calls, options.slots, 0.0, 0.0)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
