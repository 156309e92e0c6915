"""The student's weights: load a causal LM, give the loss of token sequences."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hf_reflect.embedded import content_hash, embedded_model
from hf_reflect.errors import StudentError
from hf_reflect.student.encoding import Tokens, prepended_bos


_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.model")


class CausalLM:
    """A causal LM of transformers, loaded when it is first needed.

    Args:
        spec: `local` (the embedded model), a `.gguf` file, a folder, or a Hub id.

    Raises:
        StudentError: the spec names no model.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        path = embedded_model() if spec == "local" else Path(spec).expanduser()
        self.gguf = path if path.suffix == ".gguf" else None
        self.folder = None if self.gguf else (path if path.is_dir() else None)
        if self.gguf and not self.gguf.is_file():
            raise StudentError(f"student: there is no file {self.gguf}.")
        if not self.gguf and not self.folder and not _is_repo_id(spec):
            raise StudentError(
                f"student {spec!r}: not one of local, a .gguf file, a folder with a model, or a Hub id (org/name)."
            )
        self.name = spec if not (self.gguf or self.folder) else path.name
        self._lock = threading.RLock()
        self._loaded: tuple[int, Any] | None = None
        self._tokenizer: Any = None
        self._identity: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The model's name with the content of its files, or its commit on the Hub."""
        if self._identity is None:
            files = [self.gguf] if self.gguf else []
            if self.folder:
                files = sorted({file for pattern in _WEIGHTS for file in self.folder.glob(pattern)})
            state = {"hash": content_hash(*files)} if files else {"revision": self._revision()}
            self._identity = {"model": self.name, **state}
        return self._identity

    @property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer.

        Raises:
            StudentError: it can't be loaded, or has no fast version.
        """
        with self._lock:
            if self._tokenizer is None:
                from transformers import AutoTokenizer

                self._tokenizer = self._load(AutoTokenizer.from_pretrained)
                if not self._tokenizer.is_fast:
                    raise StudentError(f"student {self.spec}: its tokenizer gives no character offsets (not fast).")
            return self._tokenizer

    @property
    def bos(self) -> int | None:
        """The id in front of every text, if there is one; a GGUF file's own metadata decides before the tokenizer."""
        declared = _gguf_adds_bos(self.gguf) if self.gguf else None
        if declared is None:
            return prepended_bos(self.tokenizer)
        return self.tokenizer.bos_token_id if declared else None

    @property
    def max_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        from transformers import AutoConfig

        config = self._load(AutoConfig.from_pretrained)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else 2048

    def losses(self, sequences: Sequence[Tokens]) -> list[float]:
        """Mean negative log-likelihood of the scored tokens of each sequence, in nats per token.

        Only one thread computes at a time: a second one would take the same cores.
        """
        import torch

        with self._lock, torch.inference_mode():
            model = self._model()
            result = []
            for tokens in sequences:
                ids = torch.tensor([tokens.ids], device=model.device)
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=tokens.scored + 1).logits
                loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, tokens.first :])
                result.append(loss.item())
        return result

    def _model(self) -> Any:
        if self._loaded is None or self._loaded[0] != os.getpid():
            import torch
            from transformers import AutoModelForCausalLM

            if self._loaded is not None:
                # Forked: OpenMP's threads did not come along, and waiting for them would last for ever.
                torch.set_num_threads(1)
                self._loaded = (os.getpid(), self._loaded[1])
            else:
                model = self._load(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self._loaded = (os.getpid(), model.to(device).eval())
        return self._loaded[1]

    def _load(self, from_pretrained: Callable[..., Any], **options: Any) -> Any:
        where = str(self.gguf.parent if self.gguf else self.folder or self.spec)
        if self.gguf:
            _need_gguf()
            options["gguf_file"] = self.gguf.name
        try:
            with _quiet():
                return from_pretrained(where, **options)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StudentError(f"student {self.spec}: can't be loaded: {first}") from error

    def _revision(self) -> str:
        from transformers import AutoConfig

        return str(getattr(self._load(AutoConfig.from_pretrained), "_commit_hash", None) or "unknown")


def _is_repo_id(spec: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(spec)
    except HFValidationError:
        return False
    return True


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise StudentError("a .gguf student needs the extra `local`: pip install 'hf-reflect[local]'.") from error


def _gguf_adds_bos(path: Path) -> bool | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.add_bos_token")
    return None if field is None else bool(field.contents())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and notes of transformers while a model loads."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loading
    from transformers.utils import logging

    verbosity, bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_loading.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_loading.tqdm = partial(bar, disable=True)  # the one bar that does not heed the line above
    try:
        yield
    finally:
        gguf_loading.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
