"""What the commands print."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from hf_reflect.cards import means_table
from hf_reflect.errors import HfReflectWarning
from hf_reflect.summary import Summary, final_pair


_RECYCLED = {
    "original": "left as they were",
    "instruction": "new instruction, with its response",
    "response": "new response",
    "both": "new instruction, then a better response",
}
_CLIP = 2000


def summary(result: Summary) -> str:
    """The table at the end of a run."""
    lines = [("rows", f"{result.rows}"), ("rows kept", f"{result.kept}")]
    lines += [(f"  {_RECYCLED[name]}", f"{result.recycled[name]}") for name in _RECYCLED]
    for phase in ("instruction", "response"):
        lines.append((f"{phase} phase", ""))
        lines += [(f"  reflections {s}", f"{n}") for (p, s), n in sorted(result.statuses.items()) if p == phase]
        lines += [(f"  decisions {r}", f"{n}") for (p, r), n in sorted(result.decisions.items()) if p == phase]
    lines += [(f"mean {quantity}", f"{before} -> {after}") for quantity, (before, after) in means_table(result)]
    spent, cost = result.spent, result.purse.cost
    lines += [
        ("calls to the oracle", f"{spent.calls}, and {spent.recalled} answered from the journal"),
        ("tokens spent", f"{spent.prompt_tokens} read, {spent.completion_tokens} written"),
    ]
    lines += [("calls that failed", str(spent.failed_calls))] if spent.failed_calls else []
    lines += [] if cost is None else [("cost", f"{cost:.2f}")]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)


def pair(row: Mapping[str, Any]) -> str:
    """One row of config `reflections`, before and after."""
    if row["original"] is None:
        reasons = [reflection["reason"] for reflection in row["instruction_reflections"]]
        return f"{_title(row)}\n\nno pair could be read: {reasons[0]}"
    before, after = row["original"], final_pair(row)
    blocks = [_title(row)]
    for part in ("instruction", "input", "response"):
        if not (before[part] or after[part]):
            continue
        blocks.append(_block(part, before[part] or ""))
        if after[part] != (before[part] or ""):
            blocks.append(_block(f"{part}, recycled", after[part], "green"))
    for phase in ("instruction", "response"):
        decision = row[f"{phase}_decision"]
        for reflection in row[f"{phase}_reflections"]:
            reason = f" ({reflection['reason']})" if reflection["reason"] else ""
            title = f"reflection on the {phase} by {reflection['oracle']}: {reflection['status']}{reason}"
            blocks.append(_block(title, reflection["critique"] or "", "yellow"))
        blocks.append(_scores(row, phase) + f"kept: {decision['kept']}, {decision['reason']}")
    return "\n\n".join(blocks)


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


def _title(row: Mapping[str, Any]) -> str:
    return typer.style(f"row {row['row_id']}: {row['recycled']}", bold=True)


def _block(title: str, text: str, color: str | None = None) -> str:
    shown = printable(text)
    if len(shown) > _CLIP:
        shown = f"{shown[:_CLIP]} … ({len(text)} characters in all)"
    return f"{typer.style(title, bold=True, fg=color)}\n{shown}"


def _scores(row: Mapping[str, Any], phase: str) -> str:
    measure = "ifd" if phase == "instruction" else "rifd"
    before = row["original"][measure]
    kept = row["instruction_decision"]["candidate"]
    if phase == "response" and kept is not None:  # phase 2 starts from what phase 1 kept
        before = row["instruction_reflections"][kept][measure]
    rewrites = [reflection[measure] for reflection in row[f"{phase}_reflections"]]
    if all(score is None for score in (before, *rewrites)):
        return ""
    name = "IFD" if measure == "ifd" else "r-IFD"
    return f"{name}: before {_value(before)}, rewrite {', '.join(map(_value, rewrites))}\n"


def _value(score: Mapping[str, Any] | None) -> str:
    return "–" if score is None or score["value"] is None else f"{score['value']:.3f}"
