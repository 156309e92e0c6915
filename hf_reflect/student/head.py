"""From hidden states to losses, without ever holding the logits of a whole batch.

The model's own `forward` turns hidden states into logits, so whatever it does after the matrix (soft-capping in
Gemma 2, scaling in Granite and Cohere) is done: while it runs, its decoder is replaced by one that hands over the
hidden states we have. Whether that gives the same logits as the whole model is tried once on a probe, not assumed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


_CPU_LOGITS = 128 * 49_152
_GPU_LOGITS = 1 << 27
"""Logits in one chunk: on a CPU few enough to stay in its cache, on a GPU enough to keep it busy."""


class Head:
    """The decoder and the head of a causal LM, run one after the other.

    Args:
        model: A causal LM of transformers, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.separable = self._is_separable()

    def losses(self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Negative log-likelihood of single tokens, in nats, accumulated in float32.

        Args:
            ids: Token ids, shape (batch, length).
            rows: For each token wanted, its sequence, shape (n,).
            columns: Its position in the sequence, at least 1, shape (n,).
            **inputs: What else the decoder takes (`position_ids` of a packed batch).

        Returns:
            Shape (n,).
        """
        targets = ids[rows, columns]
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
