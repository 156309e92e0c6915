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
OracleOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Who reflects: local (an embedded small model), local:PATH.gguf, http://HOST/v1 (any OpenAI-compatible "
        "server), tgi:URL, hf:MODEL[@PROVIDER], endpoint:NAMESPACE/NAME, or replay:DATASET. The rewrites of several "
        "compete.  [default: local]",
        metavar="ORACLE",
    ),
]
OracleModel = Annotated[str | None, typer.Option(help="The model's name at the server; or write URL#MODEL.")]
Student = Annotated[
    str | None,
    typer.Option(
        help="Who decides: local, a Hub id, a folder or a .gguf file; with --method reflect also none.  "
        "[default: local]"
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="paper, json, staged, or a YAML file.  [default: paper; staged for an embedded oracle]",
        metavar="STYLE|FILE",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest reply in tokens.  [default: 2048; 320 for an embedded oracle]")
]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="Of the oracle's sampling.  [default: 0]")]
Seed = Annotated[int | None, typer.Option(help="Seed of the oracle's sampling.")]
JournalOption = Annotated[
    Path | None, typer.Option(help="Where replies and scores are kept.  [default: a file under HF_HOME]")
]
Concurrency = Annotated[
    int | None,
    typer.Option(min=1, help="Most calls in flight at once; how many really are follows the server.  [default: 16]"),
]
Timeout = Annotated[float | None, typer.Option(min=0.1, help="Seconds to wait for one reply.  [default: 600]")]
Attempts = Annotated[int, typer.Option(min=1, help="Tries per call, where a failure may pass.")]
Patience = Annotated[float, typer.Option(min=0.0, help="Seconds of nothing but failures before the run stops.")]
Rpm = Annotated[float | None, typer.Option(min=0.1, help="Most requests per minute.")]
Tpm = Annotated[float | None, typer.Option(min=1, help="Most tokens per minute, read and written.")]
MaxTokensTotal = Annotated[
    int | None, typer.Option(min=0, help="Stop asking when so many tokens were read and written in this run.")
]
MaxCost = Annotated[float | None, typer.Option(min=0.0, help="Stop asking when so much was spent in this run.")]
PriceIn = Annotated[float | None, typer.Option(min=0.0, help="Price of a million tokens read.")]
PriceOut = Annotated[float | None, typer.Option(min=0.0, help="Price of a million tokens written.")]
PauseAfter = Annotated[
    bool, typer.Option("--pause-after", help="Pause the Inference Endpoint when the run ends, also when it fails.")
]
RetryTruncated = Annotated[
    int | None,
    typer.Option(min=1, help="Ask once more with room for N tokens where a reply was cut off.", metavar="N"),
]
GuardsOption = Annotated[
    str | None,
    typer.Option(
        help="Checks on rewrites, separated by commas: language, code, copy, length, similarity; or none.  "
        "[default: language,code,copy]"
    ),
]
Longest = Annotated[
    float | None, typer.Option(min=1, help="Guard length: a response may be N times as long.  [default: 10]")
]
Similarity = Annotated[
    float | None, typer.Option(help="Guard similarity: least cosine of old and new instruction.  [default: 0.3]")
]
PushToHub = Annotated[str | None, typer.Option(help="Push the result to this dataset on the Hub.", metavar="REPO")]
Private = Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a private repository.")]
