"""The student: a local causal LM that scores pairs and never writes."""

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_reflect.journal import Journal
from hf_reflect.pairs import Pair
from hf_reflect.student.encoding import Encoder, Passes, Tokens
from hf_reflect.student.model import CausalLM
from hf_reflect.student.templates import NONE, Scored, Template


__all__ = ["Score", "Student", "load_student"]


@dataclass(frozen=True, slots=True)
class Score:
    """One IFD or r-IFD with what it was computed from.

    Attributes:
        status: `ok`; `truncated` (the target's end was cut off in both passes; the value is null where nothing was
            left); `empty` or `too_short` (nothing to score; the value is null); `not_finite` (the model gave no
            number).
        value: `exp(conditioned_loss - direct_loss)`, a ratio of perplexities.
        conditioned_loss: L(target | prefix), mean negative log-likelihood in nats per token.
        direct_loss: L(target).
        conditioned_tokens: Tokens that the conditioned loss is the mean of.
        direct_tokens: Likewise for the direct loss.
    """

    status: str
    value: float | None = None
    conditioned_loss: float | None = None
    direct_loss: float | None = None
    conditioned_tokens: int | None = None
    direct_tokens: int | None = None


class Student:
    """Scores pairs with the model that will be trained on them.

    Args:
        model: The causal LM.
        template: How a pair is laid out as text.
        max_length: The longest sequence in tokens; the model's own limit if not given.
    """

    def __init__(self, model: CausalLM, *, template: Template = NONE, max_length: int | None = None) -> None:
        self.model, self.template = model, template
        self._max_length, self._encoder = max_length, None  # type: int | None, Encoder | None

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.model.name

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines a score besides the pair."""
        return {
            **self.model.identity,
            "template": self.template.name,
            "boundary": "aligned",
            "dtype": self.model.dtype,
            "max_length": self._max_length or self.model.max_length,
        }

    def ifd(self, pairs: Sequence[Pair], journal: Journal) -> list[Score]:
        """IFD(y|x) = ppl(y|x) / ppl(y) of each pair (arXiv 2402.10110, equation 3)."""
        return self._score([self.template.forward(pair) for pair in pairs], journal)

    def reversed_ifd(self, pairs: Sequence[Pair], journal: Journal) -> list[Score]:
        """r-IFD(x|y) = ppl(x|q(y)) / ppl(x) of each pair (arXiv 2402.10110, equation 8)."""
        return self._score([self.template.reverse(pair) for pair in pairs], journal)

    def _score(self, texts: Sequence[Scored], journal: Journal) -> list[Score]:
        if self._encoder is None:
            limit = self._max_length or self.model.max_length
            self._encoder = Encoder(self.model.tokenizer, self.model.bos, limit)
        passes = self._encoder.encode(texts)
        losses = self._losses([t for p in passes for t in (p.conditioned, p.direct) if t], journal)
        return [_score(p, losses) for p in passes]

    def _losses(self, sequences: Sequence[Tokens], journal: Journal) -> dict[Tokens, float]:
        """The loss of each distinct sequence: from the journal where it is there, else computed and recorded."""
        prefix = f"{self.model.identity}\0{self.model.dtype}\0".encode()
        keys = {tokens: _key(prefix, tokens) for tokens in sequences}
        known = journal.get("loss", keys.values())
        missing = [tokens for tokens, key in keys.items() if key not in known]
        computed = self.model.losses(missing) if missing else {}
        journal.put("loss", {keys[tokens]: loss for tokens, loss in computed.items()})
        return {tokens: computed[tokens] if tokens in computed else known[key] for tokens, key in keys.items()}


def load_student(spec: "str | Student", **options: Any) -> Student:
    """The student that a spec names.

    Args:
        spec: `local` (the embedded model), a Hub id, a folder, a `.gguf` file, or a student already.
        **options: As for `Student`.

    Raises:
        StudentError: the spec names no model.
    """
    if isinstance(spec, Student):
        return spec
    if spec not in _MODELS:
        _MODELS[spec] = CausalLM(spec)
    return Student(_MODELS[spec], **{name: value for name, value in options.items() if value is not None})


_MODELS: dict[str, CausalLM] = {}
"""Weights are loaded once per process, however many transforms use them."""


def _score(passes: Passes, losses: dict[Tokens, float]) -> Score:
    if passes.conditioned is None or passes.direct is None:
        return Score(passes.status)
    conditioned, direct = losses[passes.conditioned], losses[passes.direct]
    counts = (passes.conditioned.scored, passes.direct.scored)
    if not (math.isfinite(conditioned) and math.isfinite(direct)):
        return Score("not_finite", None, None, None, *counts)
    return Score(passes.status, math.exp(conditioned - direct), conditioned, direct, *counts)


def _key(prefix: bytes, tokens: Tokens) -> str:
    return hashlib.sha256(prefix + array("q", (tokens.first, *tokens.ids)).tobytes()).hexdigest()
