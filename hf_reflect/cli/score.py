"""`hf-reflect score` and `hf-reflect select`: filtering by IFD without an oracle."""

from pathlib import Path
from typing import Annotated

import typer

from hf_reflect.cli.hub import check_target, push_result
from hf_reflect.cli.options import (
    BoundaryOption,
    By,
    DtypeOption,
    Limit,
    MaxLength,
    MeasureOption,
    Name,
    Out,
    Overwrite,
    Private,
    PushToHub,
    Source,
    Split,
    Template,
)
from hf_reflect.cli.output import one_line_warnings, quieten_datasets, say_where
from hf_reflect.errors import HfReflectError


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
    limit: Limit = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
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

    check_target(push_to_hub)
    quieten_datasets()
    with one_line_warnings():
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
    say_where(out)
    push_result(out, push_to_hub, private)


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
    from_analysis: Annotated[
        bool,
        typer.Option(
            "--from-analysis",
            help="SOURCE holds losses that the papers' authors published: decide as their code does, without a model.",
        ),
    ] = False,
    name: Name = None,
    split: Split = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the best rows of SOURCE to OUT, in their own order.

    \b
    hf-reflect select --from-analysis MingLiiii/Alpaca_Analysis_llama2_7b selected
    hf-reflect select scored best --by ifd --top 10% --below-one
    hf-reflect select data.jsonl baseline --by random --count 1000 --seed 1
    """
    from hf_reflect.ranking import TopFraction
    from hf_reflect.scoring import select as select_rows

    quieten_datasets()
    if from_analysis:
        _select_from_analysis(source, out, overwrite)
        return
    share = None if top is None else fraction(top, "--top")
    choice = TopFraction(by.value, share, count, below_one, per, seed)
    for key, chosen in select_rows(source, out, choice, name=name, split=split, overwrite=overwrite).items():
        typer.echo(f"{key}: {len(chosen.indices)} of {chosen.rows} rows; {chosen.not_scored} have no score", nl=False)
        typer.echo(f", {chosen.left_out} are not below 1" if below_one else "")
    say_where(out)


def _select_from_analysis(source: str, out: Path, overwrite: bool) -> None:
    from hf_reflect.analysis import select_from_analysis

    found = select_from_analysis(source, out, overwrite=overwrite)
    typer.echo(f"{found.kept} of {found.rows} rows are kept; of {found.not_scored} some loss is missing")
    for what, rows in sorted(found.recycled.items()):
        typer.echo(f"  {what}  {rows}")
    say_where(out)


def fraction(share: str, option: str) -> float:
    """A share such as `10%` or `0.1` as a number.

    Raises:
        HfReflectError: it is none.
    """
    try:
        return float(share.strip().removesuffix("%")) / 100 if share.strip().endswith("%") else float(share)
    except ValueError:
        raise HfReflectError(f"{option} {share}: not a share such as 10% or 0.1.") from None
