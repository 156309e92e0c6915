"""The embedded oracle: a GGUF model run in this process by xllamacpp (llama.cpp)."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_reflect.embedded import content_hash
from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import Reply, Request, RowFailedError


_REPEAT_PENALTY = 1.1
"""Small models fall into loops when they decode greedily."""


class LocalOracle:
    """Answers with a GGUF model in this process; no server, no network.

    Args:
        path: The `.gguf` file.
        concurrency: Requests decoded together, each in a slot of its own.
        context: Tokens that fit in one slot, prompt and reply together.

    Raises:
        OracleError: the file is not there, or the extra `local` is not installed.
    """

    prompts = "staged"
    max_tokens = 320

    def __init__(self, path: str | Path, *, concurrency: int = 4, context: int = 4096) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise OracleError(f"oracle: there is no file {self.path}.")
        self.name, self.concurrency, self.context = self.path.name, concurrency, context
        self.spec = f"local:{self.path}"
        self._identity: dict[str, Any] | None = None
        self._server: tuple[int, Any] | None = None
        _import_xllamacpp()

    @property
    def identity(self) -> dict[str, Any]:
        """The content of the model file, wherever it lies."""
        if self._identity is None:
            digest = content_hash(self.path)
            self._identity = {"kind": "local", "model": self.name, "hash": digest, "repeat_penalty": _REPEAT_PENALTY}
        return self._identity

    async def complete(self, request: Request) -> Reply:
        """Answers one request.

        Raises:
            RowFailedError: it does not fit the context.
        """
        sampling = request.sampling
        body: dict[str, Any] = {
            "messages": [dict(message) for message in request.messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "repeat_penalty": _REPEAT_PENALTY,
            # A reply must not depend on what was asked before it.
            "cache_prompt": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if request.schema:
            schema = {"name": "reflection", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        server, workers = self._serve()
        answer = _Stream()
        try:
            await asyncio.get_running_loop().run_in_executor(workers, answer.read, server, body)
        finally:
            answer.given_up = True  # cancelled: the next token is the last
        return answer.reply()

    def _serve(self) -> tuple[Any, ThreadPoolExecutor]:
        # The model is loaded on the first request, and again in a forked process, where its threads are gone.
        if self._server is None or self._server[0] != os.getpid():
            self._server = (os.getpid(), (self._start(), ThreadPoolExecutor(self.concurrency, "hf_reflect-oracle")))
        server: tuple[Any, ThreadPoolExecutor] = self._server[1]
        return server

    def _start(self) -> Any:
        xllamacpp = _import_xllamacpp()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_parallel = self.concurrency
        params.n_ctx = self.context * self.concurrency
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        params.verbosity = -1
        params.ui = False
        try:
            return xllamacpp.Server(params)
        except RuntimeError as error:
            raise OracleError(f"oracle: {self.path} can't be loaded by llama.cpp: {error}") from error


class _Stream:
    """A reply as it arrives, piece by piece, which can be given up in between."""

    def __init__(self) -> None:
        self.given_up = False
        self._pieces: list[str] = []
        self._thinking: list[str] = []
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._error: str | None = None

    def read(self, server: Any, body: dict[str, Any]) -> None:
        if not self.given_up:
            server.handle_chat_completions(body, self._take)

    def _take(self, event: dict[str, Any]) -> bool:
        """Takes an event; true ends the stream."""
        if "error" in event:
            error = event["error"]
            self._error = str(error.get("message", error) if isinstance(error, dict) else error)
        for choice in event.get("choices", []):
            delta = choice.get("delta") or {}
            self._pieces.append(delta.get("content") or "")
            self._thinking.append(delta.get("reasoning_content") or "")
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._usage = event.get("usage") or self._usage
        return self.given_up

    def reply(self) -> Reply:
        if self._error is not None:
            raise RowFailedError(self._error)
        return Reply(
            text="".join(self._pieces),
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage.get("prompt_tokens"),
            completion_tokens=self._usage.get("completion_tokens"),
            thinking="".join(self._thinking) or None,
        )


def _import_xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise OracleError(
            "the embedded oracle needs the extra `local`: pip install 'hf-reflect[local]'. "
            "Or name a server: --oracle http://localhost:8000/v1"
        ) from error
    return xllamacpp
