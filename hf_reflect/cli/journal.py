"""`hf-reflect journal`: how large the record of everything paid for is, what is in it, and how to make it smaller."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_reflect.cli import options as opt
from hf_reflect.errors import HfReflectError


app = typer.Typer(
    help="Look at the record of everything paid for, export it, or make it smaller.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Kind(StrEnum):
    """What an entry holds."""

    reply = "reply"
    loss = "loss"


KindOption = Annotated[Kind | None, typer.Option(help="Only replies of oracles, or only losses of students.")]


@app.command()
def info(journal: opt.JournalOption = None) -> None:
    """Say where the journal is, how large, and what it holds."""
    book = _existing(journal)
    typer.echo(f"{book.path}: {book.size / 2**20:.1f} MiB")
    for kind, entries in book.statistics().items():
        typer.echo(f"  {kind}  {entries.count} entries, {entries.oldest:%Y-%m-%d} to {entries.newest:%Y-%m-%d}")
        if kind == "reply":
            typer.echo(f"         {entries.prompt_tokens} tokens read, {entries.completion_tokens} written")


@app.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="The JSON lines to write.  [default: standard output]")] = None,
    kind: KindOption = None,
    journal: opt.JournalOption = None,
) -> None:
    """Write every entry as a line of JSON: kind, key, value, and when it was made.

    \b
    hf-reflect journal export replies.jsonl --kind reply
    """
    book = _existing(journal)
    try:
        target: Any = sys.stdout if file is None else file.open("x", encoding="utf-8")
    except OSError as error:
        raise HfReflectError(f"{file}: can't be written: {error.strerror}.") from error
    try:
        for entry in book.entries(kind and kind.value):
            target.write(json.dumps(entry) + "\n")
    finally:
        if file is not None:
            target.close()


@app.command()
def prune(
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Only entries made more than N days ago.", metavar="N")
    ] = None,
    kind: KindOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    journal: opt.JournalOption = None,
) -> None:
    """Forget entries, and give their space back. What is forgotten has to be paid for again.

    \b
    hf-reflect journal prune --kind loss --older-than 90
    """
    book = _existing(journal)
    count = book.prune(kind and kind.value, older_than, dry=True)
    if count and not yes:
        typer.confirm(f"forget {count} entries of {book.path}?", abort=True)
    typer.echo(f"forgot {book.prune(kind and kind.value, older_than)} entries; {book.size / 2**20:.1f} MiB are left")


def _existing(path: Path | None) -> Any:
    from hf_reflect.journal import open_journal

    book = open_journal(path)
    if not book.path.is_file():
        raise HfReflectError(f"journal {book.path}: there is none yet.")
    return book
