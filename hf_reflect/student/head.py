"""From hidden states to losses, without ever holding the logits of a whole batch.

The model's own `forward` turns hidden states into logits, so whatever it does after the matrix (soft-capping in
Gemma 2, scaling in Granite and Cohere) is done: while it runs, its decoder is replaced by one that hands over the
hidden states we have. Whether that gives the same logits as the whole model is tried once on a probe, not assumed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from hf_reflect.student.encoding import Tokens


_CPU_LOGITS = 128 * 49_152
_GPU_LOGITS = 1 << 27
"""Logits in one chunk: on a CPU few enough to stay in its cache, on a GPU enough to keep it busy."""


class _Input(NamedTuple):
    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor | None


class Head:
    """The decoder and the head of a causal LM, run one after the other.

    Args:
        model: A causal LM of transformers, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.separable = self._is_separable()
        self.packs = str(model.config._attn_implementation).startswith("flash_attention") and self.packs_exactly()

    def mean_losses(self, batch: Sequence[Tokens]) -> list[float]:
        """Mean negative log-likelihood of the scored tokens of each sequence, run together."""
        counts = torch.tensor([tokens.scored for tokens in batch])
        losses = self.losses(*(self._packed(batch) if self.packs else self._padded(batch))).double().cpu()
        sums = torch.zeros(len(batch), dtype=torch.float64)
        sums.index_add_(0, torch.repeat_interleave(torch.arange(len(batch)), counts), losses)
        return [float(mean) for mean in sums / counts]

    def packs_exactly(self) -> bool:
        """Whether sequences laid end to end leave each other alone, tried on a probe."""
        batch = [Tokens(tuple(range(start, start + length)), 1) for start, length in ((1, 9), (3, 4), (0, 6))]
        batch = [Tokens(tuple(id % self.vocabulary for id in tokens.ids), 1) for tokens in batch]
        with torch.inference_mode():
            apart, packed = self.losses(*self._padded(batch)), self.losses(*self._packed(batch))
        # The same sums in another order: in bfloat16 they differ in the third digit, mixed sequences in the first.
        rounding = 16 * torch.finfo(self.model.dtype).eps
        return bool(torch.allclose(apart, packed, rtol=rounding, atol=rounding * apart.abs().max().item()))

    def _padded(self, batch: Sequence[Tokens]) -> "_Input":
        """One row a sequence, padded at the right, where a causal model doesn't look, so no mask is needed."""
        longest = max(len(tokens.ids) for tokens in batch)
        ids = torch.tensor([(*tokens.ids, *([0] * (longest - len(tokens.ids)))) for tokens in batch])
        rows = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([tokens.scored for tokens in batch]))
        columns = torch.cat([torch.arange(tokens.first, len(tokens.ids)) for tokens in batch])
        return self._on_device(ids, rows, columns)

    def _packed(self, batch: Sequence[Tokens]) -> "_Input":
        """All sequences end to end in one row: positions that start again say where each begins."""
        lengths = [len(tokens.ids) for tokens in batch]
        starts = list(accumulate(lengths, initial=0))
        ids = torch.tensor([[id for tokens in batch for id in tokens.ids]])
        columns = torch.cat(
            [torch.arange(start + t.first, start + len(t.ids)) for start, t in zip(starts, batch, strict=False)]
        )
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return self._on_device(ids, torch.zeros_like(columns), columns, positions)

    def _on_device(self, *tensors: torch.Tensor) -> "_Input":
        ids, rows, columns, *positions = (tensor.to(self.model.device) for tensor in tensors)
        return _Input(ids, rows, columns, positions[0] if positions else None)

    def losses(
        self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Negative log-likelihood of single tokens, in nats, accumulated in float32.

        Args:
            ids: Token ids, shape (batch, length).
            rows: For each token wanted, its sequence, shape (n,).
            columns: Its position in the sequence, at least 1, shape (n,).
            positions: Position ids of a packed batch, the shape of `ids`. Without a cache, they tell transformers
                where sequences begin; with one, attention would silently run across them.

        Returns:
            Shape (n,).
        """
        targets = ids[rows, columns]
        inputs = {} if positions is None else {"position_ids": positions}
        if not self.separable:
            logits = self.model(input_ids=ids, use_cache=False, **inputs).logits[rows, columns - 1]
            return _cross_entropy(logits, targets)
        output = self._decoder(input_ids=ids, use_cache=False, **inputs)
        hidden = output.last_hidden_state[rows, columns - 1]
        chunk = max(1, (_CPU_LOGITS if ids.device.type == "cpu" else _GPU_LOGITS) // self.vocabulary)
        with self._decoder_gives(type(output)) as logits_of:
            parts = [
                _cross_entropy(logits_of(hidden[start : start + chunk]), targets[start : start + chunk])
                for start in range(0, len(targets), chunk)
            ]
        return torch.cat(parts)

    @property
    def _decoder(self) -> Any:
        return getattr(self.model, self.model.base_model_prefix)

    @contextmanager
    def _decoder_gives(self, kind: type) -> Iterator[Any]:
        name, decoder = self.model.base_model_prefix, self._decoder
        given = _Given(kind)

        def logits_of(hidden: torch.Tensor) -> torch.Tensor:
            given.hidden = hidden[None]
            nothing = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            logits: torch.Tensor = self.model(input_ids=nothing, use_cache=False).logits
            return logits[0]

        setattr(self.model, name, given)
        try:
            yield logits_of
        finally:
            setattr(self.model, name, decoder)

    def _is_separable(self) -> bool:
        decoder = getattr(self.model, self.model.base_model_prefix or "", None)
        if decoder is None or decoder is self.model:
            return False
        ids = torch.arange(8, device=self.model.device)[None] % self.vocabulary
        with torch.inference_mode():
            whole = self.model(input_ids=ids, use_cache=False).logits[0]
            output = decoder(input_ids=ids, use_cache=False)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                return False
            with self._decoder_gives(type(output)) as logits_of:
                parts = logits_of(hidden[0])
        # The same numbers through the same code: only the rounding of another shape of product may differ.
        rounding = 16 * torch.finfo(whole.dtype).eps
        return bool(
            torch.allclose(whole.float(), parts.float(), rtol=rounding, atol=rounding * whole.abs().max().item())
        )


class _Given(torch.nn.Module):
    """Stands in for a decoder and gives the hidden states it was told to."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.hidden: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.kind(last_hidden_state=self.hidden)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
