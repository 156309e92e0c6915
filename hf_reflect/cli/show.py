"""`hf-reflect show`: look at single rows of a result."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_reflect.cli import output
from hf_reflect.errors import HfReflectError


def show(
    out: Annotated[Path, typer.Argument(help="A folder that a run wrote.")],
    row: Annotated[
        int | None, typer.Option(min=0, help="The row's index in the source.  [default: the first that changed]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split.  [default: the first]")] = None,
) -> None:
    """Print a pair before and after, with critique, scores and decision.

    \b
    hf-reflect show recycled --row 7
    """
    typer.echo(output.pair(_find(_table(out, split), row, out)))


def _table(out: Path, split: str | None) -> Any:
    import pyarrow.parquet as pq

    files = sorted((out / "reflections").glob(f"{split or '*'}-*.parquet"))
    if not files:
        what = f"no split {split!r} in it" if split else "no result of a run"
        raise HfReflectError(f"{out}: there is {what}.")
    first = files[0].name.split("-")[0]
    return pq.ParquetDataset([str(file) for file in files if file.name.split("-")[0] == first]).read()


def _find(table: Any, row: int | None, out: Path) -> dict[str, Any]:
    import pyarrow.compute as pc

    wanted = pc.not_equal(table["recycled"], "original") if row is None else pc.equal(table["row_id"], row)
    found: list[dict[str, Any]] = table.filter(wanted).slice(0, 1).to_pylist()
    if not found and row is None:
        found = table.slice(0, 1).to_pylist()
    if not found:
        raise HfReflectError(f"{out}: there is no row {row}; it has rows 0 to {table.num_rows - 1}.")
    return found[0]
