"""The student: a local causal LM that scores pairs and never writes."""

import hashlib
import math
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hf_reflect.errors import HfReflectWarning
from hf_reflect.journal import Journal
from hf_reflect.pairs import Pair
from hf_reflect.student.encoding import Boundary, Encoder, Passes, Tokens
from hf_reflect.student.model import CausalLM, Dtype
from hf_reflect.student.templates import ChatTemplate, Scored, Template, TextTemplate, load_template


__all__ = ["Measure", "Score", "Student", "load_student", "ratio", "warn_of_template"]

Measure = Literal["ppl", "loss"]


@dataclass(frozen=True, slots=True)
class Score:
    """One IFD or r-IFD with what it was computed from.

    Attributes:
        status: `ok`; `truncated` (the target's end was cut off in both passes; the value is null where nothing was
            left); `empty` or `too_short` (nothing to score; the value is null); `not_finite` (the model gave no
            number).
        value: The ratio of perplexities, `exp(conditioned_loss - direct_loss)`, or of losses.
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
        template: How a pair is laid out as text: `none`, `alpaca`, `vicuna`, `chat` (the model's own), or a YAML file.
        boundary: `aligned` (both passes see the same tokens) or `reference` (as the published scripts do).
        measure: `ppl`, a ratio of perplexities, or `loss`, a ratio of losses (2308.12032).
        max_length: The longest sequence in tokens; the model's own limit if not given.

    Raises:
        StudentError: there is no such template.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        template: str | Path | TextTemplate = "none",
        boundary: Boundary = "aligned",
        measure: Measure = "ppl",
        max_length: int | None = None,
    ) -> None:
        self.model, self.boundary, self.measure = model, boundary, measure
        self._text_template = None if template == "chat" else _text_template(template)
        self._max_length = max_length

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.model.name

    @property
    def spec(self) -> str:
        """What `load_student` finds it by."""
        return self.model.spec

    @property
    def recipe(self) -> dict[str, Any]:
        """What a recipe says of it: enough to load it again and to tell whether it is the same."""
        texts = {"template": self._text_template.to_dict()} if self._text_template else {}
        return {"spec": self.spec, "identity": self.identity, **texts}

    @property
    def options(self) -> dict[str, Any]:
        """The options that make it again with `load_student`."""
        own = {name: self.identity[name] for name in ("boundary", "measure", "dtype", "max_length")}
        return {**own, "template": self._text_template or "chat"}

    @property
    def template(self) -> Template:
        """The layout of what is scored."""
        return self._text_template or self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.model.tokenizer, bos=self.model.bos is not None)

    @cached_property
    def _encoder(self) -> Encoder:
        limit = self._max_length or self.model.max_length
        return Encoder(self.model.tokenizer, self.model.bos, limit, self.boundary)

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines a score besides the pair."""
        return {
            **self.model.identity,
            "template": self._text_template.name if self._text_template else "chat",
            "boundary": self.boundary,
            "measure": self.measure,
            "dtype": self.model.dtype,
            "max_length": self._max_length or self.model.max_length,
        }

    def ifd(self, pairs: Sequence[Pair], journal: Journal, check: Callable[[], None] = lambda: None) -> list[Score]:
        """IFD(y|x) = ppl(y|x) / ppl(y) of each pair (arXiv 2402.10110, equation 3).

        Args:
            pairs: What to score.
            journal: Where losses are kept.
            check: Called between batches; what it raises ends the scoring, and what was computed is kept.
        """
        return self._score([self.template.forward(pair) for pair in pairs], journal, check)

    def reversed_ifd(
        self, pairs: Sequence[Pair], journal: Journal, check: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """r-IFD(x|y) = ppl(x|q(y)) / ppl(x) of each pair (arXiv 2402.10110, equation 8).

        Args:
            pairs: As for `ifd`.
            journal: As for `ifd`.
            check: As for `ifd`.
        """
        return self._score([self.template.reverse(pair) for pair in pairs], journal, check)

    def _score(self, texts: Sequence[Scored], journal: Journal, check: Callable[[], None]) -> list[Score]:
        passes = self._encoder.encode(texts)
        losses = self._losses([t for p in passes for t in (p.conditioned, p.direct) if t], journal, check)
        return [_score(p, losses, self.measure) for p in passes]

    def _losses(self, sequences: Sequence[Tokens], journal: Journal, check: Callable[[], None]) -> dict[Tokens, float]:
        """The loss of each distinct sequence: from the journal where it is there, else computed and recorded."""
        prefix = f"{self.model.identity}\0{self.model.dtype}\0".encode()
        keys = {tokens: _key(prefix, tokens) for tokens in sequences}
        known = journal.get("loss", keys.values())
        losses = {tokens: known[key] for tokens, key in keys.items() if key in known}
        if missing := [tokens for tokens in keys if tokens not in losses]:
            for computed in self.model.losses(missing):
                journal.put("loss", {keys[tokens]: loss for tokens, loss in computed.items()})
                losses |= computed
                check()
        return losses


def load_student(
    spec: "str | Student", *, dtype: Dtype | None = None, device: str | None = None, **options: Any
) -> Student:
    """The student that a spec names.

    Args:
        spec: `local` (the embedded model), a Hub id, a folder, a `.gguf` file, or a student already.
        dtype: `auto` (the default), `float32` or `bfloat16`.
        device: Such as `cuda:1`; by default the first GPU, else the CPU.
        **options: As for `Student`; what is None counts as not given.

    Raises:
        StudentError: the spec names no model, or the options no template.
    """
    if isinstance(spec, Student):
        return spec
    model = CausalLM(spec, dtype or "auto", device)
    model = _MODELS.setdefault((spec, dtype or "auto", device, model.files_state), model)
    return Student(model, **{name: value for name, value in options.items() if value is not None})


_MODELS: dict[tuple[Any, ...], CausalLM] = {}
"""Weights are loaded once per process, however many transforms use them, unless their files change."""


def _text_template(template: str | Path | TextTemplate) -> TextTemplate:
    return template if isinstance(template, TextTemplate) else load_template(template)


def _score(passes: Passes, losses: dict[Tokens, float], measure: Measure) -> Score:
    if passes.conditioned is None or passes.direct is None:
        return Score(passes.status)
    conditioned, direct = losses[passes.conditioned], losses[passes.direct]
    counts = (passes.conditioned.scored, passes.direct.scored)
    value = ratio(measure, conditioned, direct)
    if value is None:
        return Score("not_finite", None, None, None, *counts)
    return Score(passes.status, value, conditioned, direct, *counts)


def ratio(measure: Measure, conditioned: float, direct: float) -> float | None:
    """A score from its two losses: of perplexities, exp(L(y|x) - L(y)), or of losses, L(y|x) / L(y).

    Null where the losses give no finite number.
    """
    try:
        value = math.exp(conditioned - direct) if measure == "ppl" else conditioned / direct
    except (OverflowError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def warn_of_template(student: Student, at_least_one: int, rows: int) -> None:
    """Warns where most rows score an IFD of 1 or more, which says more about the template than about them."""
    if at_least_one * 2 > rows:
        warnings.warn(
            f"{at_least_one} of {rows} rows have an IFD of 1 or more: to this student most instructions make their "
            "response less likely. An unfamiliar template does that to a base model: template "
            f"{student.template.name!r} may not suit it.",
            HfReflectWarning,
            stacklevel=3,
        )


def _key(prefix: bytes, tokens: Tokens) -> str:
    return hashlib.sha256(prefix + array("q", (tokens.first, *tokens.ids)).tobytes()).hexdigest()
