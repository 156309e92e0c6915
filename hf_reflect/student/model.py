"""The student's weights: load a causal LM, give the loss of token sequences."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from hf_reflect.embedded import content_hash, embedded_model
from hf_reflect.errors import StudentError
from hf_reflect.student.batching import batches
from hf_reflect.student.encoding import Tokens, prepended_bos


Dtype = Literal["auto", "float32", "bfloat16"]

_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CPU_BUDGET = 1024
"""Tokens of a batch on a CPU: enough to keep the cores busy; larger ones fall out of its caches."""


class CausalLM:
    """A causal LM of transformers, loaded when it is first needed.

    Args:
        spec: `local` (the embedded model), a `.gguf` file, a folder, or a Hub id.
        dtype: What to compute in; `auto` is bfloat16 where the hardware multiplies it natively, else float32.
        device: Such as `cuda:1`; by default the first GPU, else the CPU.

    Raises:
        StudentError: the spec names no model.
    """

    def __init__(self, spec: str, dtype: Dtype = "auto", device: str | None = None) -> None:
        self.spec, self._dtype, self._device = spec, dtype, device
        path = embedded_model() if spec == "local" else Path(spec).expanduser()
        self.gguf = path if path.suffix == ".gguf" else None
        self.folder = path if spec and not self.gguf and path.is_dir() else None
        if self.gguf and not self.gguf.is_file():
            raise StudentError(f"student: there is no file {self.gguf}.")
        if not (self.gguf or self.folder or _is_repo_id(spec)):
            raise StudentError(
                f"student {spec!r}: not one of local, a .gguf file, a folder with a model, or a Hub id (org/name)."
            )
        if self.folder and not (self.folder / "config.json").is_file():
            # transformers would guess a model from the folder's name.
            raise StudentError(f"student {spec}: there is no model in this folder (no config.json).")
        self.name = spec if not (self.gguf or self.folder) else path.name
        self._lock = threading.RLock()
        self._head: tuple[int, Any] | None = None
        self._budget: int | None = None
        self._tokenizer: Any = None
        self._identity: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The model's name with the content of its files, or its commit on the Hub."""
        if self._identity is None:
            files = self._files
            state = {"hash": content_hash(*files)} if files else {"revision": self._revision()}
            self._identity = {"model": self.name, **state}
        return self._identity

    @property
    def files_state(self) -> tuple[Any, ...]:
        """Names, sizes and times of the model's local files: differs when they were replaced."""
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files)

    @property
    def _files(self) -> list[Path]:
        if self.folder is None:
            return [self.gguf] if self.gguf else []
        return sorted({file for pattern in _FILES for file in self.folder.glob(pattern)})

    @property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer.

        Raises:
            StudentError: it can't be loaded, or has no fast version.
        """
        with self._lock:
            if self._tokenizer is None:
                from transformers import AutoTokenizer

                if self.folder and not any((self.folder / name).is_file() for name in _TOKENIZERS):
                    raise StudentError(f"student {self.spec}: there is no tokenizer in this folder.")
                self._tokenizer = self._load(AutoTokenizer.from_pretrained)
                if not self._tokenizer.is_fast:
                    raise StudentError(f"student {self.spec}: its tokenizer gives no character offsets (not fast).")
            return self._tokenizer

    @cached_property
    def bos(self) -> int | None:
        """The id in front of every text, if there is one; a GGUF file's own metadata decides before the tokenizer."""
        declared = _gguf_adds_bos(self.gguf) if self.gguf else None
        if declared is None:
            return prepended_bos(self.tokenizer)
        return self.tokenizer.bos_token_id if declared else None

    @cached_property
    def max_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        from transformers import AutoConfig

        config = self._load(AutoConfig.from_pretrained)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else 2048

    @property
    def device(self) -> str:
        """Where it computes."""
        import torch

        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    def use_gpu(self, rank: int) -> None:
        """Computes on one of the GPUs, chosen by the rank of this process; without GPUs nothing changes."""
        import torch

        if self._head is None and self._device is None and torch.cuda.device_count():
            self._device = f"cuda:{rank % torch.cuda.device_count()}"

    @property
    def dtype(self) -> str:
        """What it computes in: `float32` or `bfloat16`."""
        if self._dtype != "auto":
            return self._dtype
        import torch

        cpu = self.device == "cpu"
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() if cpu else torch.cuda.is_bf16_supported(False)
        return "bfloat16" if native else "float32"

    def losses(self, sequences: Sequence[Tokens]) -> Iterator[dict[Tokens, float]]:
        """Mean negative log-likelihood of the scored tokens of each sequence, in nats per token, batch by batch.

        Sequences of like length run together under a budget of tokens. Running out of memory halves the budget and
        goes on. Only one thread computes at a time: a second one would take the same cores.

        Raises:
            StudentError: a single sequence does not fit in memory.
        """
        import torch

        with self._lock:
            head = self._loaded()
            known = head.model.get_input_embeddings().weight.shape[0]
            if (largest := max(max(tokens.ids) for tokens in sequences)) >= known:
                raise StudentError(
                    f"student {self.spec}: its tokenizer gives the id {largest}, its model knows {known} tokens."
                )
            self._budget = self._budget or _token_budget(head)
            todo = deque(batches(sequences, self._budget))
            while todo:
                batch = todo.popleft()
                try:
                    with torch.inference_mode():
                        means = head.mean_losses(batch)
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise StudentError(
                            f"student {self.spec}: a sequence of {len(batch[0].ids)} tokens does not fit in the "
                            "memory of the GPU; set --max-length."
                        ) from error
                    torch.cuda.empty_cache()
                    self._budget = max(1, self._budget // 2)
                    rest = [*batch, *(tokens for others in todo for tokens in others)]
                    todo = deque(batches(rest, self._budget))
                else:
                    yield dict(zip(batch, means, strict=True))

    def _loaded(self) -> Any:
        import torch

        if self._head is not None and self._head[0] != os.getpid():
            # Forked: OpenMP's threads did not come along, and waiting for them would last for ever.
            torch.set_num_threads(1)
            self._head = (os.getpid(), self._head[1])
        if self._head is None:
            from transformers import AutoModelForCausalLM

            from hf_reflect.student.head import Head

            options = {"dtype": getattr(torch, self.dtype), **self._attention()}
            model, info = self._load(AutoModelForCausalLM.from_pretrained, output_loading_info=True, **options)
            if info["missing_keys"]:
                missing = ", ".join(sorted(info["missing_keys"])[:3])
                raise StudentError(f"student {self.spec}: its files lack weights ({missing}); it can't score.")
            self._head = (os.getpid(), Head(model.to(self.device).eval()))
        return self._head[1]

    def _attention(self) -> dict[str, str]:
        """Flash attention where it is installed: it runs sequences end to end in one row, without padding."""
        from transformers.utils import is_flash_attn_2_available

        flash = self.device.startswith("cuda") and self.dtype == "bfloat16" and is_flash_attn_2_available()
        return {"attn_implementation": "flash_attention_2"} if flash else {}

    def _load(self, from_pretrained: Callable[..., Any], **options: Any) -> Any:
        where = str(self.gguf.parent if self.gguf else self.folder or self.spec)
        if self.gguf:
            _need_gguf()
            options["gguf_file"] = self.gguf.name
        from safetensors import SafetensorError

        try:
            with _quiet():
                return from_pretrained(where, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise StudentError(f"student {self.spec}: can't be loaded: {what}") from error

    def _revision(self) -> str:
        from transformers import AutoConfig

        return str(getattr(self._load(AutoConfig.from_pretrained), "_commit_hash", None) or "unknown")


def _token_budget(head: Any) -> int:
    """Tokens of a batch: on a GPU what its free memory holds, by a deliberately high estimate per token."""
    import torch

    if head.model.device.type == "cpu":
        return _CPU_BUDGET
    config = head.model.config.get_text_config()
    width = config.hidden_size * 8 + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    free, _ = torch.cuda.mem_get_info(head.model.device)
    reserved = 8 * (1 << 27)  # the chunk of logits, in bf16 and float32
    return max(2048, min(1 << 17, int((0.8 * free - reserved) / (4 * width))))


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
