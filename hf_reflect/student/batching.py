"""Which sequences run through the model together."""

from collections.abc import Iterator, Sequence

from hf_reflect.student.encoding import Tokens


def batches(sequences: Sequence[Tokens], budget: int) -> Iterator[list[Tokens]]:
    """Sequences in batches of like length, the longest first, so that running out of memory shows at once.

    Args:
        sequences: What is to be scored.
        budget: The most tokens of a batch, padding included; a single sequence may exceed it.
    """
    batch: list[Tokens] = []
    for tokens in sorted(sequences, key=lambda tokens: len(tokens.ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch
