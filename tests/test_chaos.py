"""A run against a server that fails in every way, killed again and again, ends as a calm one does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import load_dataset


ROWS = 2000
KILLS = 5
CONCURRENCY = 32


@contextmanager
def serving(folder: Path, *options: str):
    """An oracle in a process of its own, and the log of what it saw."""
    folder.mkdir()
    script = Path(__file__).parent / "chaos_server.py"
    files = ["--port-file", str(folder / "port"), "--log", str(folder / "log")]
    server = subprocess.Popen([sys.executable, str(script), *files, *options])
    try:
        while not (folder / "port").exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{(folder / 'port').read_text()}/v1", folder / "log"
    finally:
        server.kill()
        server.wait()


def start(data: Path, out: Path, url: str, journal: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "from hf_reflect.cli import main; main()", "recycle", str(data), str(out)]
    command += ["--oracle", url, "--student", "none", "--method", "reflect", "--timeout", "2"]
    command += ["--concurrency", str(CONCURRENCY), "--attempts", "8", "--journal", str(journal)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def finish(run: subprocess.Popen) -> None:
    said, complained = run.communicate(timeout=600)
    assert run.returncode == 0, said + complained


def rows_of(folder: Path, config: str) -> list[dict]:
    """The rows of a result. How many tries a reply took says what the server did, not what came of it."""
    rows = load_dataset(str(folder), config, split="train").to_list()
    for row in rows:
        for reflections in (row.get("instruction_reflections"), row.get("response_reflections")):
            for reflection in reflections or ():
                for call in reflection["calls"]:
                    call.pop("attempts")
    return rows


@pytest.mark.slow
def test_faults_and_kills_change_nothing_and_cost_nothing_twice(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."}) for i in range(ROWS)]
    data.write_text("\n".join(lines))
    with serving(tmp_path / "calm") as (url, _):
        finish(start(data, tmp_path / "calm-out", url, tmp_path / "calm-journal"))
    chance = random.Random(0)
    with serving(tmp_path / "chaos", "--faulty", "0.1", "--mean", "0.02") as (url, log):
        for _ in range(KILLS):
            run = start(data, tmp_path / "out", url, tmp_path / "journal")
            before = len(log.read_text().splitlines()) if log.exists() else 0
            wanted = chance.randint(100, 700)  # lines of the log, so a slow machine is killed in mid-run as well
            while run.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < before + wanted):
                time.sleep(0.02)
            run.send_signal(signal.SIGKILL)
            run.communicate()
        assert not (tmp_path / "out").exists()
        finish(start(data, tmp_path / "out", url, tmp_path / "journal"))
        seen = [json.loads(line) for line in log.read_text().splitlines()]
    drawn = Counter(line["fault"] for line in seen if line["event"] == "drawn")
    assert sum(drawn.values()) - drawn[None] > 0.08 * sum(drawn.values())
    assert len(drawn) == 13  # every fault, and none
    answered = Counter(line["digest"] for line in seen if line["event"] == "answered")
    again = sum(answered.values()) - len(answered)
    assert again <= KILLS * CONCURRENCY, "paid twice, beyond what was in flight when the process was killed"
    assert max(answered.values()) <= 1 + KILLS
    default = rows_of(tmp_path / "out", "default")
    assert [row["row_id"] for row in default] == list(range(ROWS))
    assert default == rows_of(tmp_path / "calm-out", "default")
    assert rows_of(tmp_path / "out", "reflections") == rows_of(tmp_path / "calm-out", "reflections")
