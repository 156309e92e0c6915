"""The command line: `hf-reflect`, or `hf reflect` where it is installed as an extension of `hf`."""

import errno
import os
import sys
from typing import Annotated

import typer

from hf_reflect import __version__
from hf_reflect.cli import demo, estimate, hub, journal, recycle, score, show, stats
from hf_reflect.cli.output import printable
from hf_reflect.errors import HfReflectError


_INTERRUPTED = 130

app = typer.Typer(
    name="hf-reflect",
    help="Recycle instruction data: an oracle LLM rewrites the weak pairs, the student model keeps what it can learn "
    "from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("recycle")(recycle.recycle)
app.command("estimate")(estimate.estimate)
app.command("reselect")(recycle.reselect)
app.command("score")(score.score)
app.command("select")(score.select)
app.command("show")(show.show)
app.command("stats")(stats.stats)
app.command("report")(stats.report)
app.command("diff")(stats.diff)
app.command("push")(hub.push)
app.command("card")(hub.card)
app.command("list")(hub.list_datasets)
app.command("info")(hub.info)
app.command("register")(hub.register)
app.command("verify")(hub.verify)
app.add_typer(journal.app, name="journal")
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-reflect {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Runs the command line; an error that a person can act on becomes one line and exit code 1."""
    try:
        app()
    except HfReflectError as error:
        typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os._exit(_no_room())
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as leaving:
        if leaving.code == _INTERRUPTED:  # typer turns an interrupt into this
            _interrupted()
        raise


def _no_room() -> int:
    typer.echo("error: the output can't be written: no space left on device.", err=True)
    return 1


def _interrupted() -> None:
    typer.echo("stopped: what was paid for is in the journal; run the same command again to go on.", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_INTERRUPTED)  # threads in the middle of a product of matrices would otherwise be waited for
