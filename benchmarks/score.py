"""Scores the same rows with a plain scorer and with ours, in one run, and compares speed and scores.

The plain scorer is what the published scripts do: one pair at a time, float32, logits of every position.

    python benchmarks/score.py --data data.jsonl --student local --rows 200

Prints JSON: rows/s, tokens/s, share of the peak of matrix products measured in the same run, peak memory, Spearman
correlation and largest difference of IFD, and the share of equal decisions with the margins of those that differ.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from hf_reflect import Journal, load_student
from hf_reflect.pairs import Pair, recognise
from hf_reflect.sources import load_source


def main() -> None:
    """Runs the comparison that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file, folder or Hub id")
    parser.add_argument("--student", default="local")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="of ours; may be repeated")
    parser.add_argument("--plain-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = read_pairs(options.data, options.rows)
    plain = PlainScorer(options.student, options.plain_dtype)
    report = {
        "command": "python " + " ".join(sys.argv),
        "machine": machine(),
        "rows": len(pairs),
        "peak_gflops": {dtype: round(peak_gflops(dtype, plain.device)) for dtype in ("float32", "bfloat16")},
    }
    reference, seconds = plain.score(pairs)
    tokens, flops = work(plain, pairs)
    plain_dtype = options.plain_dtype
    report["plain"] = speed(len(pairs), tokens, flops, seconds, report["peak_gflops"][plain_dtype])
    for dtype in options.dtype or ["float32", "bfloat16"]:
        scores, seconds = ours(options.student, dtype, pairs)
        measured = speed(len(pairs), tokens, flops, seconds, report["peak_gflops"][dtype])
        measured["times_plain"] = round(measured["rows_per_s"] / report["plain"]["rows_per_s"], 2)
        report[dtype] = measured | agreement(scores, reference)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def read_pairs(data: str, rows: int) -> list[Pair]:
    """The first pairs of a source."""
    (dataset,) = load_source(data, limit=rows).splits.values()
    row_format = recognise(dataset.column_names)
    return [row_format.read(row) for row in dataset]


class PlainScorer:
    """One pair at a time, full logits, no batches: written to be obviously right."""

    def __init__(self, spec: str, dtype: str) -> None:
        student = load_student(spec, dtype=dtype)
        self.tokenizer, self.bos = student.model.tokenizer, student.model.bos
        self.limit = student.model.max_length
        self.model = student.model._loaded().model
        self.device = self.model.device

    def passes(self, pair: Pair) -> list[tuple[list[int], int]]:
        """Token ids and the first scored position, of the conditioned and of the direct pass."""
        prefix = "\n".join(part for part in (pair.instruction, pair.input) if part) + "\n"
        joint = self.tokenizer(prefix + pair.response, add_special_tokens=False, return_offsets_mapping=True)
        start = next(i for i, (_, end) in enumerate(joint["offset_mapping"]) if end > len(prefix))
        front = [] if self.bos is None else [self.bos]
        conditioned = (front + joint["input_ids"])[: self.limit]
        direct = front + conditioned[len(front) + start :]
        return [(conditioned, len(front) + start + (not front)), (direct, 1)]

    def score(self, pairs: list[Pair]) -> tuple[list[float], float]:
        """IFD of each pair and the seconds it took."""
        scores = []
        self._loss(*self.passes(pairs[0])[0])
        begin = time.perf_counter()
        for pair in pairs:
            conditioned, direct = (self._loss(*each) for each in self.passes(pair))
            scores.append(float(torch.exp(torch.tensor(conditioned - direct))))
        return scores, time.perf_counter() - begin

    def _loss(self, ids: list[int], first: int) -> float:
        tokens = torch.tensor([ids], device=self.device)
        with torch.no_grad():
            logits = self.model(input_ids=tokens).logits[0].float()
        return torch.nn.functional.cross_entropy(logits[first - 1 : -1], tokens[0, first:]).item()


def ours(spec: str, dtype: str, pairs: list[Pair]) -> tuple[list[float], float]:
    """The same scores from the package, with a fresh journal, the model loaded beforehand."""
    student = load_student(spec, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        student.ifd(pairs[:1], Journal(Path(folder) / "warm"))
        begin = time.perf_counter()
        scores = student.ifd(pairs, Journal(Path(folder) / "journal"))
        seconds = time.perf_counter() - begin
    return [score.value for score in scores], seconds


def work(plain: PlainScorer, pairs: list[Pair]) -> tuple[int, float]:
    """Tokens of all passes, and the multiply-adds (as 2 flops) that they need: the head only where it is scored."""
    passes = [each for pair in pairs for each in plain.passes(pair)]
    head = plain.model.get_output_embeddings().weight.numel()
    embedding = plain.model.get_input_embeddings().weight.numel()
    tied = plain.model.get_output_embeddings().weight is plain.model.get_input_embeddings().weight
    body = sum(p.numel() for p in plain.model.parameters()) - embedding - (0 if tied else head)
    tokens = sum(len(ids) for ids, _ in passes)
    scored = sum(len(ids) - first for ids, first in passes)
    return tokens, 2.0 * (body * tokens + head * scored)


def speed(rows: int, tokens: int, flops: float, seconds: float, peak: float) -> dict:
    """Rows and tokens per second, the share of the matrix peak, and memory."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 2),
        "tokens_per_s": round(tokens / seconds),
        "share_of_peak": round(flops / seconds / 1e9 / peak, 3),
        "peak_memory_gib": round(memory, 2),
    }
    if torch.cuda.is_available():
        result["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def agreement(scores: list[float], reference: list[float]) -> dict:
    """How near two scorers are: ranks, values, and pairwise decisions between neighbouring rows."""
    ours_, theirs = torch.tensor(scores, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    # A decision compares two IFDs; here those of each row and the next.
    margins = theirs[1:] - theirs[:-1]
    flipped = ((ours_[1:] - ours_[:-1]) * margins) < 0
    return {
        "spearman": round(float(torch.corrcoef(torch.stack([ranks(ours_), ranks(theirs)]))[0, 1]), 6),
        "largest_difference": float((ours_ - theirs).abs().max()),
        "mean_signed_difference": float((ours_ - theirs).mean()),
        "equal_decisions": round(1 - float(flipped.double().mean()), 4),
        "margins_of_flipped": sorted(round(abs(float(m)), 5) for m in margins[flipped]),
        "median_margin": round(float(margins.abs().median()), 4),
    }


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, for Spearman's correlation (ties are not expected)."""
    return values.argsort().argsort().double()


def peak_gflops(dtype: str, device: torch.device) -> float:
    """The best rate of a large matrix product on this device."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin) / 1e9)
    return best


def machine() -> str:
    """What this ran on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        model = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), model)
        flags = ", ".join(flag for flag in ("amx_bf16", "avx512_bf16") if flag in text)
    return f"{model}, {torch.get_num_threads()} threads" + (f", {flags}" if flags else "")


if __name__ == "__main__":
    main()
