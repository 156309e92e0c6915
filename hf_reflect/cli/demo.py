"""`hf-reflect demo`: recycle the sample that ships with the package, with the embedded oracle and student."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from hf_reflect.cli import recycle, show, stats
from hf_reflect.cli.output import quieten_datasets
from hf_reflect.output import REPORT


def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of another recipe.")] = False,
) -> None:
    """Recycle a small sample offline, show what changed, and write a report."""
    from hf_reflect.sources import Source, load_source

    quieten_datasets()
    with as_file(files("hf_reflect") / "data" / "sample.jsonl") as file:
        loaded = load_source(file)
    where = {**loaded.provenance, "path": "hf_reflect/data/sample.jsonl"}  # wherever it is installed
    sample = Source(loaded.splits, where, single=False, about={"license": "apache-2.0", "language": ["en"]})
    # One reply at a time: what llama.cpp writes depends on what it computes beside it.
    recycle.run(sample, out, {}, server={"concurrency": 1}, overwrite=overwrite)
    typer.echo("\nthe first row that changed:\n")
    show.show(out)
    typer.echo(f"\nlook at all of it:  {stats.write(out, out / REPORT)}")
