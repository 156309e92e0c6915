"""Selecting from the losses that the papers' authors published, without any model.

Their analysis datasets have four splits of the same rows: the original pair (`origin`), the pair with the reflected
instruction (`reflect_instruction`), with the reflected response (`reflect_response`), and with both (`reflect_both`).
Each row has `data.loss`, four mean losses: of the instruction alone, of the response alone, of the instruction given
the response, and of the response given the instruction.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reflect import __version__
from hf_reflect.cards import render_plain_card
from hf_reflect.columns import features
from hf_reflect.errors import SourceError
from hf_reflect.loading import load_recycled
from hf_reflect.output import OutputFolder
from hf_reflect.recipe import TaskRecipe
from hf_reflect.selection import Candidate, Keep, Recycled, check, choose, keep
from hf_reflect.student import ratio


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("origin", "reflect_instruction", "reflect_response", "reflect_both")

_AFTER: dict[tuple[bool, bool], Recycled] = {
    (False, False): "original",
    (True, False): "instruction",
    (False, True): "response",
    (True, True): "both",
}


@dataclass(frozen=True)
class Analysed:
    """What was selected from an analysis.

    Attributes:
        rows: Rows of the analysis.
        kept: How many of them are kept.
        recycled: Rows by what the student decides on them.
        not_scored: Rows of which some loss is missing.
        dataset: The rows that are kept: `row_id`, `recycled`, `ifd`, `rifd`.
    """

    rows: int
    kept: int
    recycled: Mapping[str, int]
    not_scored: int
    dataset: "Dataset"


def select_from_analysis(
    analysis: "str | Path | DatasetDict",
    output: str | Path | None = None,
    *,
    policy: Keep = "below-one",
    overwrite: bool = False,
) -> Analysed:
    """Decides on each row as Selective Reflection-Tuning does, from published losses.

    With the policy of the authors' code, `below-one`, the analysis of Alpaca by Llama 2 7B gives the 37,114 rows that
    they trained on (arXiv 2402.10110, table 1).

    Args:
        analysis: A Hub id, a folder, or the splits.
        output: A folder to write the rows to that are kept.
        policy: Which rows to keep, as for `recycle`.
        overwrite: Replace a folder with other settings.

    Raises:
        HfReflectError: it is no analysis dataset.
    """
    from datasets import Dataset

    check("keep", policy, Keep)
    splits = load_recycled(str(analysis)) if isinstance(analysis, str | Path) else analysis
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise SourceError(f"{analysis}: no analysis dataset: it lacks the splits {', '.join(missing)}.")
    lengths = {len(splits[split]) for split in SPLITS}
    if len(lengths) > 1:
        raise SourceError(f"{analysis}: its splits have different numbers of rows.")
    if any("data" not in splits[split].column_names for split in SPLITS):
        raise SourceError(f"{analysis}: no analysis dataset: a split lacks the column data.")
    losses = {split: splits[split]["data"] for split in SPLITS}
    recycled: Counter[str] = Counter()
    rows, not_scored = [], 0
    for i in range(lengths.pop()):
        scores = [_scores(losses[split][i]) for split in SPLITS]
        not_scored += any(None in pair for pair in scores)
        what, ifd, rifd = _decide(*scores)
        recycled[what] += 1
        if keep(policy, what, ifd, rifd):
            rows.append({"row_id": i, "recycled": what, "ifd": ifd, "rifd": rifd})
    if not rows:
        raise SourceError(f"{analysis}: no row is kept.")
    kept = Dataset.from_list(rows, features=features(("row_id", "recycled", "ifd", "rifd")))
    made = Analysed(sum(recycled.values()), len(rows), dict(recycled), not_scored, kept)
    if output is not None:
        _write(made, analysis, policy, output, overwrite)
    return made


Scores = tuple[float | None, float | None]
"""IFD and r-IFD."""


def _scores(data: Mapping[str, Sequence[float]] | None) -> Scores:
    if not isinstance(data, Mapping | None):
        raise SourceError(f"an analysis has losses in its column data, not {type(data).__name__}.")
    losses = list((data or {}).get("loss") or ())
    if len(losses) != 4 or any(loss is None or loss != loss for loss in losses):
        return None, None
    instruction, response, instruction_given, response_given = losses
    return ratio("ppl", response_given, response), ratio("ppl", instruction_given, instruction)


def _decide(origin: Scores, instruction: Scores, response: Scores, both: Scores) -> tuple[Recycled, Any, Any]:
    """Both phases: the higher IFD, then the lower r-IFD (arXiv 2402.10110, equations 6 and 9)."""
    first = choose("ifd", origin[0], [Candidate(True, instruction[0])]).candidate is not None
    before, after = (instruction, both) if first else (origin, response)
    second = choose("rifd", before[1], [Candidate(True, after[1])]).candidate is not None
    return _AFTER[first, second], *(after if second else before)


def _write(made: Analysed, analysis: Any, policy: str, output: str | Path, overwrite: bool) -> None:
    settings = {"analysis": str(analysis) if isinstance(analysis, str | Path) else "in memory", "keep": policy}
    folder = OutputFolder(output, TaskRecipe("select-from-analysis", settings, __version__), overwrite=overwrite)
    try:
        folder.write("default", "train", made.dataset)
        title = f"{folder.path.name}: selected from published losses"
        folder.finish(lambda files: render_plain_card(title, files, made.kept, str(output), settings))
    except BaseException:
        folder.discard()
        raise
