"""What the commands print."""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import typer

from hf_reflect.describing import Description
from hf_reflect.errors import HfReflectWarning
from hf_reflect.selection import Keep
from hf_reflect.summary import LEFT_OUT, Summary, final_pair, result_of


_RECYCLED = {
    "original": "left as they were",
    "instruction": "new instruction, with its response",
    "response": "new response",
    "both": "new instruction, then a better response",
}
_CLIP = 2000
_NAMES = {"ifd": "IFD", "rifd": "r-IFD"}


def summary(result: Summary) -> str:
    """The table at the end of a run."""
    lines = [("rows", f"{result.rows}"), ("rows kept", f"{result.kept}")]
    kept = Counter[str]()
    for (_, _, what), count in result.flows.items():
        kept[what] += count
    lines += [(f"  {_RECYCLED[name]}", f"{kept[name]}") for name in _RECYCLED]
    for phase in ("instruction", "response"):
        lines.append((f"{phase} phase", ""))
        lines += [(f"  reflections {s}", f"{n}") for (p, s), n in sorted(result.statuses.items()) if p == phase]
        lines += [(f"  decisions {r}", f"{n}") for (p, r), n in sorted(result.decisions.items()) if p == phase]
    means = Description.of(result).before_and_after()
    lines += [(f"mean {quantity}", f"{before} -> {after}") for quantity, before, after, _ in means]
    spent, cost = result.spent, result.purse.cost
    lines += [
        ("calls to the oracle", f"{spent.calls}, and {spent.recalled} answered from the journal"),
        ("tokens spent", f"{spent.prompt_tokens} read, {spent.completion_tokens} written"),
    ]
    lines += [("calls that failed", str(spent.failed_calls))] if spent.failed_calls else []
    lines += [] if cost is None else [("cost", f"{cost:.2f}")]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)


def pair(row: Mapping[str, Any], split: str = "", policy: Keep = "all") -> str:
    """One row of config `reflections`, before and after, with the words in colour that differ."""
    left_out = ", left out" if result_of(row, policy) == LEFT_OUT else ""
    title = typer.style(printable(f"{split}row {row['row_id']}: {row['recycled']}{left_out}"), bold=True)
    if row["original"] is None:
        reasons = [reflection["reason"] or "" for reflection in row["instruction_reflections"]]
        return f"{title}\n\nno pair could be read: {printable(reasons[0] or '')}"
    before, after = row["original"], final_pair(row)
    blocks = [title]
    for turn in before.get("context") or ():
        blocks.append(_block(printable(f"earlier turn of {turn['role']}"), _shown(turn["content"] or "")))
    for part in ("instruction", "input", "response"):
        old, new = (_shown(pair[part] or "") for pair in (before, after))
        if after[part] == (before[part] or ""):
            blocks += [_block(part, old)] if old else []
        else:
            old, new = _coloured(old, new)
            blocks += [_block(part, old), _block(f"{part}, recycled", new or "(none)", "green")]
    for phase in ("instruction", "response"):
        decision = row[f"{phase}_decision"]
        for reflection in row[f"{phase}_reflections"]:
            reason = f" ({reflection['reason']})" if reflection["reason"] else ""
            title = f"reflection on the {phase} by {reflection['oracle']}: {reflection['status']}{reason}"
            blocks.append(_block(printable(title), _shown(reflection["critique"] or ""), "yellow"))
        blocks.append(_scores(row, phase) + printable(f"kept: {decision['kept']}, {decision['reason']}"))
    gains = [f"{name} {_gain(before[key], row[f'{key}_score'])}" for key, name in _NAMES.items()]
    return "\n\n".join([*blocks, f"in the end: {', '.join(gains)}"] if row["ifd_score"] else blocks)


def say_where(out: Path) -> None:
    """Prints where a result is and how to open it."""
    typer.echo(f"\nwritten to {out}")
    typer.echo(f'load it:  datasets.load_dataset("{out}")')


def quieten_datasets() -> None:
    """Where nobody watches, the bars of `datasets` are only noise; what it logs, our own errors say."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Says our own warnings in a line each on stderr; those of the libraries are not for the user of a command."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HfReflectWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, HfReflectWarning):
            typer.echo(f"warning: {warning.message}", err=True)


def printable(text: str) -> str:
    """A text without control characters: data must not steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or c in "\u200d\u200c" else "\ufffd" for c in text)


def _shown(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= _CLIP else f"{shown[:_CLIP]} … ({len(text)} characters in all)"


def _block(title: str, text: str, color: str | None = None) -> str:
    return f"{typer.style(title, bold=True, fg=color)}\n{text}"


def _coloured(before: str, after: str) -> tuple[str, str]:
    """Two texts with the words coloured that the other lacks."""
    old, new = (re.split(r"(\s+)", text) for text in (before, after))
    olds, news = [], []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        same = kind == "equal"
        olds.append("".join(old[a:b]) if same else typer.style("".join(old[a:b]), fg="red"))
        news.append("".join(new[c:d]) if same else typer.style("".join(new[c:d]), fg="green"))
    return "".join(olds), "".join(news)


def _scores(row: Mapping[str, Any], phase: str) -> str:
    measure = "ifd" if phase == "instruction" else "rifd"
    before = row["original"][measure]
    kept = row["instruction_decision"]["candidate"]
    if phase == "response" and kept is not None:  # phase 2 starts from what phase 1 kept
        before = row["instruction_reflections"][kept][measure]
    rewrites = [reflection[measure] for reflection in row[f"{phase}_reflections"]]
    if all(score is None for score in (before, *rewrites)):
        return ""
    return f"{_NAMES[measure]}: before {_value(before)}, rewrite {', '.join(map(_value, rewrites))}\n"


def _value(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "–" if score is None or not score.get("status") else f"– ({printable(score['status'])})"
    return f"{score['value']:.3f}"


def _gain(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    old, new = ((score or {}).get("value") for score in (before, after))
    return _value(after) if old is None or new is None else f"{_value(after)} ({new - old:+.3f})"
