"""IFD without an oracle: score a dataset, or select from one, into a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reflect import __version__
from hf_reflect.cards import render_plain_card
from hf_reflect.columns import updated
from hf_reflect.errors import SourceError
from hf_reflect.journal import Journal
from hf_reflect.output import OutputFolder
from hf_reflect.progress import bars
from hf_reflect.ranking import Selected, TopFraction
from hf_reflect.recipe import TaskRecipe
from hf_reflect.sources import load_source
from hf_reflect.student import Student, load_student, warn_of_template
from hf_reflect.transforms import ScoreIFD, ScoreReversedIFD


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_SHARD = 1000


@dataclass
class Scores:
    """What scoring found.

    Attributes:
        rows: Rows of the source.
        statuses: Rows by score (`ifd`, `rifd`) and status.
        ifd_at_least_one: Rows whose IFD is 1 or more.
    """

    rows: int
    statuses: dict[tuple[str, str], int]
    ifd_at_least_one: int


def score(
    dataset: "str | Path | Dataset | DatasetDict",
    output: str | Path,
    *,
    student: "str | Student" = "local",
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    journal: Journal | str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Scores:
    """Adds `ifd`, `rifd` and `ira` with their losses, token counts and statuses to every row, and writes a folder.

    Memory does not grow with the dataset: shards go to the folder as they are done.

    Args:
        dataset: A Hub id, a folder, a file, a `Dataset` or a `DatasetDict`.
        output: The folder to write.
        student: Who scores.
        name: The configuration of the source, where it has several.
        split: Only this split.
        limit: Only the first so many rows of each split.
        journal: Where losses are kept; by default under `HF_HOME`.
        overwrite: Replace a folder with other settings.
        progress: Show a bar (on a terminal).
        **options: As for `load_student`: `template`, `boundary`, `measure`, `dtype`, `max_length`.

    Raises:
        HfReflectError: the source, the student or the output can't be used.
    """
    source = load_source(dataset, name=name, split=split, limit=limit)
    judge = load_student(student, **options)
    settings = {"source": {**source.provenance, "split": split, "limit": limit}, "student": judge.identity}
    folder = OutputFolder(output, TaskRecipe("score", settings, __version__), overwrite=overwrite)
    transforms = [ScoreIFD(judge, journal=journal), ScoreReversedIFD(judge, journal=journal)]
    found = Scores(0, {}, 0)
    slow = {"score IFD": transforms[0], "score r-IFD": transforms[1]}
    with _writing(folder), bars(slow, sum(map(len, source.splits.values())), shown=progress):
        for key, rows in source.splits.items():
            for start in range(0, len(rows), _SHARD):
                shard = rows.select(range(start, min(start + _SHARD, len(rows))))
                for transform in (*transforms, _add_ira):
                    shard = shard.map(transform, batched=True, batch_size=_SHARD // 4, keep_in_memory=True)
                _count(found, shard)
                folder.write("default", key, shard)
        title = f"{folder.path.name}: scored"
        folder.finish(lambda files: render_plain_card(title, files, found.rows, str(output), settings))
    warn_of_template(judge, found.ifd_at_least_one, found.rows)
    return found


def select(
    dataset: "str | Path | Dataset | DatasetDict",
    output: str | Path,
    choice: TopFraction,
    *,
    name: str | None = None,
    split: str | None = None,
    overwrite: bool = False,
) -> dict[str, Selected]:
    """Writes the best rows of each split of a dataset, in their own order, to a folder.

    Args:
        dataset: What `score` or `recycle` wrote; for `length` and `random` any source.
        output: The folder to write.
        choice: Which rows to take.
        name: The configuration of the source, where it has several.
        split: Only this split.
        overwrite: Replace a folder with other settings.

    Returns:
        What was taken, by split.

    Raises:
        HfReflectError: the source or the output can't be used, or a column that is needed is missing.
    """
    source = load_source(dataset, name=name, split=split, scored=True)
    chosen = {key: choice.choose(rows) for key, rows in source.splits.items()}
    settings = {"source": {**source.provenance, "split": split}, "choice": asdict(choice)}
    folder = OutputFolder(output, TaskRecipe("select", settings, __version__), overwrite=overwrite)
    rows = sum(len(selected.indices) for selected in chosen.values())
    if not rows:
        folder.discard()
        raise SourceError(f"{dataset}: no row is left to select.")
    with _writing(folder):
        for key, selected in chosen.items():
            folder.write("default", key, source.splits[key].select(selected.indices))
        title = f"{folder.path.name}: selected by {choice.by}"
        folder.finish(lambda files: render_plain_card(title, files, rows, str(output), settings))
    return chosen


def _add_ira(batch: Any) -> Any:
    """IRA = L(y) - L(y|x), in nats per token (arXiv 2410.11540): from the losses of IFD, whatever its measure."""
    scores = batch["ifd_score"]
    ira = [s["direct_loss"] - s["conditioned_loss"] if s and s["value"] is not None else None for s in scores]
    return updated(batch, {"ira": ira})


def _count(found: Scores, rows: "Dataset") -> None:
    found.rows += len(rows)
    found.ifd_at_least_one += sum(value is not None and value >= 1 for value in rows["ifd"])
    for measure in ("ifd", "rifd"):
        for value in rows[f"{measure}_score"]:
            key = (measure, value["status"] if value else "unreadable")
            found.statuses[key] = found.statuses.get(key, 0) + 1


@contextmanager
def _writing(folder: OutputFolder) -> Iterator[None]:
    """Forgets a folder that is not finished."""
    try:
        yield
    except BaseException:
        folder.discard()
        raise
