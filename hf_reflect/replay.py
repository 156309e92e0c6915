"""Oracles that answer from the `reflections` of a recycled dataset: selecting again costs nothing."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_reflect.errors import OracleError, RecipeError
from hf_reflect.oracles.base import Reply, Request, RowFailedError, Sampling
from hf_reflect.pairs import Pair, Turn
from hf_reflect.prompts import Phase, Prompts
from hf_reflect.recipe import FILE, Recipe
from hf_reflect.reflection import Reflector, proposed


Row = Mapping[str, Any]


class Recording:
    """What the oracles of a run said.

    Args:
        location: The folder that a run wrote, or the Hub id it was pushed to.

    Raises:
        OracleError: there is no recycled dataset.
    """

    def __init__(self, location: str) -> None:
        self.location = str(Path(location).expanduser()) if Path(location).expanduser().is_dir() else location
        self.recipe = _recipe(location)
        self.reflections = self._load("reflections")

    @cached_property
    def default(self) -> dict[str, Any]:
        """The recycled dataset, by split."""
        return self._load("default")

    @cached_property
    def oracles(self) -> list["ReplayOracle"]:
        """One for each oracle of the run."""
        return [ReplayOracle(self, number) for number in range(len(self.recipe.oracles))]

    def _load(self, config: str) -> dict[str, Any]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return dict(load_dataset(self.location, config))
        except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OracleError(f"oracle replay:{self.location}: its config {config} can't be opened: {why}") from error


class ReplayOracle:
    """Answers what one oracle of a recorded run answered. What was never asked has no answer.

    Args:
        recording: The run.
        number: Which of its oracles.
    """

    recorded = True
    concurrency = 64

    def __init__(self, recording: Recording, number: int) -> None:
        self._recording, self._number = recording, number
        entry = recording.recipe.oracles[number]
        self.spec = f"replay:{recording.location}"
        self.name = str(entry.get("name") or entry["identity"].get("model"))
        self.asked_with = Prompts.from_dict(entry["prompts"], self.spec)
        self.sampling = Sampling(**entry["sampling"])
        self.retry_truncated = recording.recipe.retry_truncated
        self.prompts: str = self.asked_with.style
        self.max_tokens = self.sampling.max_tokens
        self._where: dict[bytes, tuple[str, int, Phase, int]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The recorded run, and whom it asked."""
        return {
            "kind": "replay",
            "model": self.name,
            "recipe": self._recording.recipe.hash,
            "number": self._number,
        }

    async def complete(self, request: Request) -> Reply:
        """The recorded answer.

        Raises:
            RowFailedError: it was not recorded.
        """
        if self._where is None:
            self._where = self._index()
        found = self._where.get(_key(request))
        if found is None:
            raise RowFailedError("nobody asked this when the replayed dataset was made", "skipped")
        split, row, phase, number = found
        calls = self._recording.reflections[split][row][f"{phase}_reflections"][self._number]["calls"]
        return _reply(calls[number])

    def _index(self) -> dict[bytes, tuple[str, int, Phase, int]]:
        """Where the answer to each request is: found by asking everything once more."""
        where: dict[bytes, tuple[str, int, Phase, int]] = {}
        for split, rows in self._recording.reflections.items():
            for i, row in enumerate(rows.select_columns(_NEEDED)):
                for phase, pair, calls in self._asked(row):
                    for number, key in enumerate(_requests(pair, phase, calls, self)):
                        where[key] = (split, i, phase, number)
        return where

    def _asked(self, row: Row) -> Iterator[tuple[Phase, Pair, list[Row]]]:
        if row["original"] is None:
            return
        pair = original_pair(row)
        phases: tuple[Phase, ...] = ("instruction", "response")
        for phase in phases:
            reflections = row[f"{phase}_reflections"]
            if self._number < len(reflections):
                yield phase, pair, reflections[self._number]["calls"]
            kept = row[f"{phase}_decision"]["candidate"]
            if kept is not None:
                chosen = reflections[kept]
                pair = proposed(pair, chosen["instruction"], chosen["input"], chosen["response"])


_NEEDED = [
    "original",
    "instruction_reflections",
    "instruction_decision",
    "response_reflections",
    "response_decision",
]


def original_pair(row: Row) -> Pair:
    """The pair that a row of config `reflections` began with."""
    original = row["original"]
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in original["context"] or ())
    return Pair(original["instruction"], original["response"], original["input"] or "", turns)


def _requests(pair: Pair, phase: Phase, calls: list[Row], oracle: ReplayOracle) -> list[bytes]:
    """The keys of the requests that led to these calls, in order."""
    keys: list[bytes] = []

    async def ask(request: Request) -> Reply:
        if len(keys) == len(calls):
            raise RowFailedError("nothing more was recorded")
        keys.append(_key(request))
        return _reply(calls[len(keys) - 1])

    more = oracle.retry_truncated
    reflector = Reflector(ask, oracle.name, oracle.asked_with, oracle.sampling, phase, retry_truncated=more)
    _run_at_once(reflector.reflect(pair))
    return keys


def _run_at_once(coroutine: Any) -> None:
    """Runs a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("the coroutine waited for something")


def _key(request: Request) -> bytes:
    messages = [dict(message) for message in request.messages]
    said = json.dumps([request.sampling.max_tokens, messages], sort_keys=True)
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _reply(call: Row) -> Reply:
    return Reply(
        call["text"],
        call["finish_reason"],
        call["prompt_tokens"],
        call["completion_tokens"],
        call.get("thinking"),
        call.get("attempts") or 1,
    )


def _recipe(location: str) -> Recipe:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(location).expanduser()
    try:
        if path.is_dir():
            return Recipe.read(path)
        return Recipe.read(hf_hub_download(location, FILE, repo_type="dataset"))
    except (RecipeError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OracleError(
            f"oracle replay:{location}: neither a folder that a run wrote nor such a dataset on the Hub ({why})."
        ) from error
