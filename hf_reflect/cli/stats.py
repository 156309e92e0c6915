"""`hf-reflect stats`, `diff` and `report`: see what the recycling did."""

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from hf_reflect.cli.options import PriceIn, PriceOut
from hf_reflect.cli.output import printable
from hf_reflect.errors import HfReflectError
from hf_reflect.output import REPORT


Folder = Annotated[Path, typer.Argument(help="A folder that a run wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Coherence = Annotated[
    str | None,
    typer.Option(
        help="Also the cosine of instruction and response under this sentence-transformers model: a Hub id, a folder, "
        "or local. Needs the extra coherence.",
        metavar="MODEL",
    ),
]


def stats(
    out: Folder,
    coherence: Coherence = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    as_json: AsJson = False,
) -> None:
    """Print statistics before and after: lengths, perplexities, scores, their changes, decisions, cost.

    \b
    hf-reflect stats recycled
    hf-reflect stats recycled --coherence sentence-transformers/all-MiniLM-L6-v2 --price-in 0.1 --price-out 0.3
    hf-reflect stats recycled --json > stats.json
    """
    from hf_reflect.describing import describe

    found = describe(out, coherence=coherence, price_in=price_in, price_out=price_out)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo(printable(str(found)))


def diff(
    first: Folder,
    second: Annotated[Path, typer.Argument(help="Another one, over the same rows.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to name that differ.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Compare two runs over the same rows, say of another oracle or student: decisions, and statistics side by side.

    \b
    hf-reflect diff recycled recycled-for-llama
    """
    from hf_reflect.comparing import compare

    found = compare(first, second)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo(printable("\n\n".join(table.to_text() for table in found.tables())))
    if found.changed[:rows]:
        typer.echo("\nThe first rows that differ in the result")
    for row in found.changed[:rows]:
        reasons = "; ".join(f"{phase}: {one} -> {other}" for phase, (one, other) in row.decisions.items())
        typer.echo(
            printable(f"  {row.split} {row.row}  {row.before} -> {row.after}" + (f"  ({reasons})" if reasons else ""))
        )


def report(
    out: Folder,
    file: Annotated[Path | None, typer.Option(help=f"The file to write.  [default: {REPORT} in the folder]")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most rows to put in; of more, an even sample.")] = 50_000,
    coherence: Coherence = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write a page with numbers, pictures and all rows, before and after. It is one file and needs no network.

    \b
    hf-reflect report recycled --open
    """
    written = write(out, file or out / REPORT, rows, coherence, price_in, price_out)
    typer.echo(f"written to {written}")
    if open_it and not webbrowser.open(written.resolve().as_uri()):
        raise HfReflectError(f"no browser could be opened; open {written} yourself.")


def write(
    out: Path,
    file: Path,
    rows: int = 50_000,
    coherence: str | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
) -> Path:
    """Writes the report of a folder."""
    from hf_reflect.describing import describe
    from hf_reflect.plotting import can_draw, draw
    from hf_reflect.report import write_report

    found = describe(out, coherence=coherence, price_in=price_in, price_out=price_out)
    return write_report(out, file, tables=found.tables(), pictures=draw(found) if can_draw() else (), rows=rows)
