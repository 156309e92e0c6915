"""The loopback oracle as a process that answers after a random time and misbehaves at random.

    python chaos_server.py --port-file PORT --log LOG --mean 0.5 --sigma 1 --faulty 0.1

What happens to a call depends on its body and on how often it came, so a run can be repeated. The log has a line of
JSON for each call that was received and each that was answered as it should be.
"""

import argparse
import asyncio
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

from oracle_server import FAULTS, Answer, Call, OracleServer, completion, error


CHAOS = {name: FAULTS[name] for name in ("429", "500", "502", "503", "reset", "reset-middle", "not-json")}
CHAOS |= {name: FAULTS[name] for name in ("truncated-json", "no-choices", "wrong-type", "hang")}
CHAOS["429-wait"] = lambda call: error(429, retry_after=0.2)
HARMLESS = {"wrong-type"}
"""Faults that a client need not notice."""


class ChaosServer(OracleServer):
    """An oracle that does what chance says.

    Args:
        mean: Mean seconds per completion, lognormally distributed.
        sigma: Standard deviation of their logarithm.
        faulty: Share of calls to which something happens.
        log: Where calls are recorded.
    """

    def __init__(self, mean: float, sigma: float, faulty: float, log: Path) -> None:
        super().__init__(self.draw, log=log)
        self.mean, self.sigma, self.faulty = mean, sigma, faulty
        self.drawn: dict[tuple[str, int], tuple[str | None, float]] = {}

    def draw(self, call: Call) -> Answer:
        chance = random.Random(f"{call.digest} {call.attempt}")
        fault = chance.choice(sorted(CHAOS)) if chance.random() < self.faulty else None
        mu = math.log(self.mean) - self.sigma**2 / 2 if self.mean else 0.0
        delay = chance.lognormvariate(mu, self.sigma) if self.mean else 0.0
        self.drawn[call.digest, call.attempt] = (fault, delay)
        self._write("drawn", call)
        return replace(CHAOS[fault](call) if fault else completion(call), delay=delay)

    def _record(self, event: str, call: Call) -> None:
        fault, _ = self.drawn.get((call.digest, call.attempt), (None, 0.0))
        if event == "answered" and (fault is None or fault in HARMLESS):
            self._write("answered", call)

    def _write(self, event: str, call: Call) -> None:
        fault, delay = self.drawn[call.digest, call.attempt]
        line = {"event": event, "digest": call.digest, "fault": fault, "delay": delay}
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")


def main() -> None:
    """Serves in this process until it is killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port-file", type=Path, required=True, help="where the port is written once it is open")
    parser.add_argument("--log", type=Path, required=True, help="where calls are recorded")
    parser.add_argument("--mean", type=float, default=0.0, help="mean seconds per completion")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of their logarithm")
    parser.add_argument("--faulty", type=float, default=0.0, help="share of calls to which something happens")
    options = parser.parse_args()

    async def serve() -> None:
        server = ChaosServer(options.mean, options.sigma, options.faulty, options.log)
        serving = asyncio.ensure_future(server.serve())
        while not server.port:
            await asyncio.sleep(0.01)
        unfinished = options.port_file.with_suffix(".part")
        unfinished.write_text(str(server.port))
        os.replace(unfinished, options.port_file)
        await serving

    asyncio.run(serve())


if __name__ == "__main__":
    main()
