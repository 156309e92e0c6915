"""What the scripts of `dataset_scripts/` share: input dataset, output dataset, then the options of a command."""

import sys
import tempfile
from pathlib import Path

from hf_reflect.cli import main


def run(command: str, doc: str | None) -> None:
    """Runs a command as a script does.

    Args:
        command: `recycle`, `score` or `reselect`.
        doc: The script's docstring, shown where the two datasets are not given.
    """
    given = sys.argv[1:]
    if len(given) < 2 or given[0].startswith("-") or given[1].startswith("-"):
        sys.exit(f"{doc}\nusage: {Path(sys.argv[0]).name} INPUT OUTPUT [options of hf-reflect {command}]")
    source, output, *options = given
    if output.startswith((".", "/", "~")):
        sys.argv[1:] = [command, source, output, *options]
        main()
        return
    with tempfile.TemporaryDirectory(prefix="hf_reflect-") as folder:
        sys.argv[1:] = [command, source, f"{folder}/{output.rpartition('/')[2]}", "--push-to-hub", output, *options]
        main()
