"""Resident memory of `score` while rows stream through it.

    python benchmarks/memory.py --rows 100000

A tiny random model stands in for the student, so that what is measured is what grows with the rows, if anything does:
the weights and activations of a real one are constant.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from hf_reflect import score


WORDS = "name list three of the best ways to cook rice and explain why each of them works well at home".split()  # noqa: SIM905


def main() -> None:
    """Writes the rows, scores them, and prints JSON: resident memory at tenths of the run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student, data = _tiny_student(Path(folder) / "student"), Path(folder) / "data.jsonl"
        chance = random.Random(0)
        with data.open("w") as file:
            for i in range(options.rows):
                instruction, output = " ".join(chance.choices(WORDS, k=12)), " ".join(chance.choices(WORDS, k=40))
                file.write(json.dumps({"instruction": f"{i}: {instruction}", "output": output}) + "\n")
        samples: list[tuple[float, int]] = []
        done = threading.Event()
        threading.Thread(target=_watch, args=(samples, done), daemon=True).start()
        begun = time.monotonic()
        score(data, Path(folder) / "out", student=str(student), journal=Path(folder) / "journal", progress=False)
        seconds = time.monotonic() - begun
        done.set()
        journal = sum(file.stat().st_size for file in Path(folder).glob("journal*"))
    tenths = [max(rss for at, rss in samples if (tenth - 1) / 10 <= (at - begun) / seconds <= tenth / 10)
              for tenth in range(1, 11)]  # fmt: skip
    report = {
        "command": f"python benchmarks/memory.py --rows {options.rows}",
        "rows": options.rows,
        "rows_per_second": round(options.rows / seconds, 1),
        "resident_mib_by_tenth_of_the_run": [round(rss / 2**20) for rss in tenths],
        "journal_mib": round(journal / 2**20),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _watch(samples: list[tuple[float, int]], done: threading.Event) -> None:
    process = psutil.Process()
    while not done.wait(0.2):
        samples.append((time.monotonic(), process.memory_info().rss))


def _tiny_student(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(sorted({*WORDS, *"0123456789:", "[UNK]"}))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
