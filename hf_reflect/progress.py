"""Progress bars for the slow steps of a run."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hf_reflect.transforms import Transform


@contextmanager
def bars(
    transforms: Mapping[str, Transform], total: int, *, shown: bool, note: Callable[[], str] | None = None
) -> Iterator[None]:
    """A bar for each transform, on a terminal, with rows per second and the time that is left.

    Args:
        transforms: By title.
        total: Rows that each will see.
        shown: Whether bars are wanted at all.
        note: What to say beside the first bar.
    """
    from tqdm.auto import tqdm

    lock = threading.Lock()
    open_bars = [
        tqdm(total=total, desc=title, unit="row", position=i, disable=None if shown else True)
        for i, title in enumerate(transforms)
    ]

    def watch(bar: Any) -> Callable[[int], None]:
        def done(rows: int) -> None:
            with lock:
                if note is not None and bar is open_bars[0]:
                    bar.set_postfix_str(note(), refresh=False)
                bar.update(rows)

        return done

    for transform, bar in zip(transforms.values(), open_bars, strict=True):
        transform.done = watch(bar)
    try:
        with without_dataset_bars():
            yield
    finally:
        for bar in open_bars:
            bar.close()


@contextmanager
def without_dataset_bars() -> Iterator[None]:
    """Silences the bars of `datasets`, of which a run would show one per shard and step."""
    import datasets

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()
