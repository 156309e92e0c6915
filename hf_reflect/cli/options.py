"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each split.")]
