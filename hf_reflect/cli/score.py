"""`hf-reflect score` and `hf-reflect select`: filtering by IFD without an oracle."""

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_reflect.errors import HfReflectError


class Boundary(StrEnum):
    """Where a target begins."""

    aligned = "aligned"
    reference = "reference"


class Measure(StrEnum):
    """What a score is the ratio of."""

    ppl = "ppl"
    loss = "loss"


class Dtype(StrEnum):
    """What the student computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class By(StrEnum):
    """What rows are selected by."""

    ifd = "ifd"
    rifd = "rifd"
    ira = "ira"
    length = "length"
    random = "random"


Source = Annotated[
    str, typer.Argument(help="A Hub id, a folder with a dataset, or a .json, .jsonl, .parquet or .csv file.")
]
Out = Annotated[Path, typer.Argument(help="The folder to write.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="How a pair is laid out for the student: none, alpaca, vicuna, chat (its own), or a YAML file.  "
        "[default: none]",
        metavar="TEMPLATE|FILE",
    ),
]
BoundaryOption = Annotated[
    Boundary | None,
    typer.Option(help="aligned: both passes see the same tokens; reference: as the published scripts.  [aligned]"),
]
MeasureOption = Annotated[Measure | None, typer.Option(help="A ratio of perplexities or of losses.  [default: ppl]")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="auto is bfloat16 where the hardware has it.  [default: auto]")
]
MaxLength = Annotated[int | None, typer.Option(min=8, help="Longest sequence in tokens.  [default: the model's]")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result with other settings.")]
Name = Annotated[str | None, typer.Option(help="The configuration of the source, where it has several.")]
Split = Annotated[str | None, typer.Option(help="Only this split.")]


def score(
    source: Source,
    out: Out,
    student: Annotated[str, typer.Option(help="Who scores: local, a Hub id, a folder or a .gguf file.")] = "local",
    template: Template = None,
    boundary: BoundaryOption = None,
    measure: MeasureOption = None,
    dtype: DtypeOption = None,
    max_length: MaxLength = None,
    name: Name = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each split.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Where losses are kept.  [default: a file under HF_HOME]")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add IFD, r-IFD and IRA to every row of SOURCE, with losses, token counts and statuses, and write OUT.

    \b
    hf-reflect score alpaca_data.json scored --student Qwen/Qwen2.5-0.5B
    hf-reflect select scored best --by ifd --top 10% --below-one
    """
    from hf_reflect.scoring import score as score_dataset

    quieten_datasets()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = score_dataset(
            source,
            out,
            student=student,
            name=name,
            split=split,
            limit=limit,
            journal=journal,
            overwrite=overwrite,
            max_length=max_length,
            template=template,
            boundary=boundary and boundary.value,
            measure=measure and measure.value,
            dtype=dtype and dtype.value,
        )
    typer.echo(f"rows  {found.rows}")
    for (kind, status), count in sorted(found.statuses.items()):
        typer.echo(f"  {kind} {status}  {count}")
    for warning in caught:
        if warning.category is UserWarning and "IFD" in str(warning.message):
            typer.echo(f"warning: {warning.message}", err=True)
    say_where(out)


def select(
    source: Annotated[str, typer.Argument(help="What score or recycle wrote; for length and random any source.")],
    out: Out,
    by: Annotated[By, typer.Option(help="ifd, ira, length: highest first; rifd: lowest first.")] = By.ifd,
    top: Annotated[str | None, typer.Option(help="A share of all rows, such as 10%.", metavar="PERCENT")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many rows.")] = None,
    below_one: Annotated[
        bool, typer.Option("--below-one", help="Leave out rows with IFD (by rifd: r-IFD) of 1 or more.")
    ] = False,
    per: Annotated[str | None, typer.Option(help="Take the same share for each value of a column.")] = None,
    seed: Annotated[int, typer.Option(help="For random.")] = 0,
    name: Name = None,
    split: Split = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the best rows of SOURCE to OUT, in their own order.

    \b
    hf-reflect select scored best --by ifd --top 10% --below-one
    hf-reflect select data.jsonl baseline --by random --count 1000 --seed 1
    """
    from hf_reflect.ranking import TopFraction
    from hf_reflect.scoring import select as select_rows

    quieten_datasets()
    fraction = None if top is None else _fraction(top)
    choice = TopFraction(by.value, fraction, count, below_one, per, seed)
    for key, chosen in select_rows(source, out, choice, name=name, split=split, overwrite=overwrite).items():
        typer.echo(f"{key}: {len(chosen.indices)} of {chosen.rows} rows; {chosen.not_scored} have no score", nl=False)
        typer.echo(f", {chosen.left_out} are not below 1" if below_one else "")
    say_where(out)


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


def _fraction(top: str) -> float:
    try:
        return float(top.strip().removesuffix("%")) / 100 if top.strip().endswith("%") else float(top)
    except ValueError:
        raise HfReflectError(f"--top {top}: not a share such as 10% or 0.1.") from None
