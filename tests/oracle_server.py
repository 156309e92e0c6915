"""Loopback servers that speak the protocols of oracles over real sockets, and misbehave on order.

`OracleServer` speaks OpenAI's chat protocol, `TGIServer` that of Text Generation Inference, and `HubServer` what
Hugging Face hosts: the Hub's API as far as oracles need it, the router of Inference Providers, and Inference Endpoints
with their control plane.

In a test:

    with OracleServer() as server:
        server.rule = lambda call: error(503) if call.attempt == 1 else None
        ChatOracle(server.url)
    server.calls  # everything that arrived, with its headers

As a process of its own, so that calls can be counted while its clients are killed:

    python oracle_server.py --port-file PORT --log LOG --latency 0.05

The log has a line of JSON when a completion was received (before anything is answered), and another when it was
answered successfully.

An answer is a function of the request's body and of nothing else. To teach the server another protocol, add handlers
to `routes`; an `Answer` whose body is a tuple goes out in chunks.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs


@dataclass(frozen=True)
class Call:
    """One HTTP request, as it arrived.

    Attributes:
        headers: By lower-case name.
        body: What the JSON said; null without a body.
        attempt: How often this very request has come, this time included.
        number: How many requests to this path have come, this one included.
        at: When it came, in seconds of the event loop's clock.
        query: What stands behind the `?`, decoded.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    attempt: int
    number: int
    at: float
    query: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    @property
    def user(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Answer:
    """What goes back.

    Attributes:
        body: Bytes, text, or something for JSON; a tuple of bytes is sent chunk by chunk.
        headers: Besides the usual ones, or in their place; an empty value leaves one out.
        delay: Seconds to wait first.
        cut: Reset the connection `before` anything is sent, or in the `middle` of the body.
        hang: Never answer.
    """

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: str | None = None
    hang: bool = False

    @property
    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


Rule = Callable[[Call], Answer | None]
Handler = Callable[[Call], Answer]


class OracleServer:
    """The server. It runs in a thread of its own, on a free port of 127.0.0.1.

    Attributes:
        rule: What to answer to a completion instead of the usual; null means the usual.
        models: What `/v1/models` lists.
        calls: Everything received so far.
        most_at_once: The most completions that were in flight together.
        routes: Handlers by method and path.
    """

    def __init__(
        self, rule: Rule | None = None, models: tuple[str, ...] = ("teacher",), log: Path | None = None, port: int = 0
    ) -> None:
        self.rule, self.models, self.log, self.port = rule, models, log, port
        self.calls: list[Call] = []
        self.most_at_once = 0
        self.routes: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._list_models,
            ("POST", "/v1/chat/completions"): self._complete,
        }
        self._at_once = 0
        self._seen: Counter[str] = Counter()
        self._paths: Counter[str] = Counter()
        self._connections: set[asyncio.Task[Any]] = set()
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        """The base that a client is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def completions(self) -> list[Call]:
        """The calls that asked for a completion."""
        return [call for call in self.calls if call.method == "POST"]

    def __enter__(self) -> "OracleServer":
        threading.Thread(target=lambda: asyncio.run(self.serve()), name="oracle-server", daemon=True).start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port and every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    async def serve(self) -> None:
        """Serves until stopped."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._thread = threading.current_thread()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=512, limit=1 << 24)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(task := asyncio.current_task())
        try:
            while (call := await self._read(reader)) is not None:
                await self._answer(call, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is gone, or was sent away
        except asyncio.CancelledError:
            pass  # the server stops
        finally:
            self._connections.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Call | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        (path, _, query), body = target.partition("?"), json.loads(raw) if raw else None
        identity = f"{method} {path} {digest_of(body)}"
        self._seen[identity] += 1
        self._paths[path] += 1
        counts = self._seen[identity], self._paths[path]
        call = Call(method, path, headers, body, *counts, self._loop.time(), parse_qs(query))
        self.calls.append(call)
        return call

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> None:
        handler = self.routes.get((call.method, call.path))
        counted = handler is not None and call.method == "POST"
        if counted:
            self._record("received", call)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = handler(call) if handler else error(404, "no such route")
            await asyncio.sleep(answer.delay)
            if answer.hang:
                await asyncio.Event().wait()
            await _send(answer, writer, bodiless=call.method == "HEAD")
        finally:
            if counted:
                self._at_once -= 1
        if counted and answer.status == 200:
            self._record("answered", call)

    def _record(self, event: str, call: Call) -> None:
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(json.dumps({"event": event, "digest": call.digest}) + "\n")

    def _list_models(self, call: Call) -> Answer:
        return Answer(body={"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    def _complete(self, call: Call) -> Answer:
        return (self.rule and self.rule(call)) or completion(call)


async def _send(answer: Answer, writer: asyncio.StreamWriter, *, bodiless: bool) -> None:
    if answer.cut == "before":
        _reset(writer)
    chunked = isinstance(answer.body, tuple)
    length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(answer.payload))}
    headers = {"Content-Type": "application/json", **length, **answer.headers}
    head = f"HTTP/1.1 {answer.status} Status\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items() if v) + "\r\n"
    writer.write(head.encode("latin-1"))
    if answer.cut == "middle":
        writer.write(answer.payload[: len(answer.payload) // 2])
        await writer.drain()
        _reset(writer)
    if bodiless:
        pass
    elif chunked:
        for chunk in (*answer.body, b""):
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            await writer.drain()
    else:
        writer.write(answer.payload)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Makes the kernel send RST in place of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise ConnectionResetError


class TGIServer(OracleServer):
    """Text Generation Inference, as its router answers (router/src/server.rs and validation.rs of v3).

    Attributes:
        rule: What to answer to `/generate`, `/` and `/generate_stream` instead of the usual; null means the usual.
        model_id: The model that `/info` names; with `sha`, its revision.
        context: `max_total_tokens`, of what is read and written together.
        tokenizer: Encodes like a `tokenizers.Tokenizer`; by default each word is a token.
        bos: What the tokenizer puts in front of a text, and the chat template writes out.
        chat_tokenize: Whether there is that route; older servers have none.
        refused_roles: Roles that the chat template refuses.
        api_key: What `--api-key` was given, which protects all that generates.
        return_full_text: What `/` takes for granted; it is so for models tagged text-generation.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        *,
        model_id: str = "org/teacher",
        sha: str | None = "0123abc",
        context: int | None = 4096,
        tokenizer: Any = None,
        bos: str | None = None,
        chat_tokenize: bool = True,
        refused_roles: tuple[str, ...] = (),
        api_key: str | None = None,
        return_full_text: bool = True,
    ) -> None:
        super().__init__(rule)
        self.model_id, self.sha, self.context, self.bos = model_id, sha, context, bos
        self.tokenizer = tokenizer or _Words(bos)
        self.refused_roles, self.api_key, self.return_full_text = refused_roles, api_key, return_full_text
        self.routes = {
            ("GET", "/info"): self._info,
            ("GET", "/health"): lambda call: Answer(headers={"Content-Type": ""}),
            ("GET", "/"): lambda call: Answer(headers={"Content-Type": ""}),
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/generate"): lambda call: self._generate(call, stream=False),
            ("POST", "/generate_stream"): lambda call: self._generate(call, stream=True),
            ("POST", "/"): self._compatible,
        }
        if chat_tokenize:
            self.routes["POST", "/chat_tokenize"] = self._chat_tokenize

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def generations(self) -> list[Call]:
        """The calls that asked for text."""
        asking = [call for call in self.completions if call.path in ("/", "/generate", "/generate_stream")]
        return [call for call in asking if call.body != {}]

    def read_by_model(self, call: Call) -> list[str]:
        """The tokens that the model reads for a call: those of its text, after those that the tokenizer adds."""
        encoded = self.tokenizer.encode(call.body["inputs"], add_special_tokens=True)
        return list(encoded.tokens)

    def _info(self, call: Call) -> Answer:
        context = (
            {} if self.context is None else {"max_input_tokens": self.context - 1, "max_total_tokens": self.context}
        )
        return Answer(
            body={
                "model_id": self.model_id,
                "model_sha": self.sha,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": 128,
                "max_best_of": 2,
                "max_stop_sequences": 4,
                **context,
                "validation_workers": 2,
                "max_client_batch_size": 4,
                "router": "text-generation-router",
                "version": "3.3.7",
                "sha": None,
                "docker_label": None,
            }
        )

    def _chat_tokenize(self, call: Call) -> Answer:
        for message in call.body["messages"]:
            if message["role"] in self.refused_roles:
                return tgi_error(422, f"Template error: {message['role']} role not supported", "template_error")
        text = chat_ml(call.body["messages"], self.bos or "")
        return Answer(body={"tokenize_response": self._tokens(text, special=False), "templated_text": text})

    def _tokenize(self, call: Call) -> Answer:
        return self._refused_key(call) or Answer(body=self._tokens(call.body["inputs"], special=True))

    def _tokens(self, text: str, *, special: bool) -> list[dict[str, Any]]:
        encoded = self.tokenizer.encode(text, add_special_tokens=special)
        return [
            {"id": one, "text": text[start:stop], "start": start, "stop": stop}
            for one, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True)
        ]

    def _compatible(self, call: Call) -> Answer:
        """The route of the old Inference API: a list of one, and the prompt goes first unless that is declined."""
        if call.body.get("stream"):
            return self._generate(call, stream=True)
        answer = self._generate(call, stream=False)
        if answer.status != 200 or not isinstance(answer.body, dict) or "generated_text" not in answer.body:
            return answer
        asked = (call.body.get("parameters") or {}).get("return_full_text")
        full = self.return_full_text if asked is None else False  # the other routes have dealt with true
        text = (call.body["inputs"] if full else "") + answer.body["generated_text"]
        return replace(answer, body=[{**answer.body, "generated_text": text}])

    def _generate(self, call: Call, *, stream: bool) -> Answer:
        if call.body == {}:
            return self._asked_for_nothing(call)
        answer = self._refused_key(call) or (self.rule and self.rule(call)) or self._refused(call)
        answer = answer or generation(call, tokenizer=self.tokenizer)
        return _streamed(answer) if stream else answer

    def _asked_for_nothing(self, call: Call) -> Answer:
        """A proxy turns it away as it did what came before; TGI itself finds it invalid."""
        before = next((earlier for earlier in reversed(self.calls) if earlier in self.generations), None)
        answer = self._refused_key(call) or (before and self.rule and self.rule(before))
        by_tgi = answer is None or (isinstance(answer.body, dict) and "error_type" in answer.body)
        if by_tgi and answer is not None and "Retry-After" in answer.headers:
            by_tgi = False  # only a proxy says that
        return self._refused(call) if by_tgi or answer.status == 200 else answer

    def _refused_key(self, call: Call) -> Answer | None:
        if self.api_key is None or call.headers.get("authorization") == f"Bearer {self.api_key}":
            return None
        return Answer(401, headers={"Content-Type": ""})

    def _refused(self, call: Call) -> Answer | None:
        if not isinstance(call.body, dict) or not isinstance(call.body.get("inputs"), str):
            said = "Failed to deserialize the JSON body into the target type: missing field `inputs`"
            return Answer(422, said, {"Content-Type": "text/plain; charset=utf-8"})
        if why := self._invalid(call.body["inputs"], call.body.get("parameters") or {}):
            return tgi_error(422, f"Input validation error: {why}", "validation")
        return None

    def _invalid(self, inputs: str, given: Mapping[str, Any]) -> str | None:
        read = len(self.tokenizer.encode(inputs, add_special_tokens=True).ids)
        wanted, grammar = given.get("max_new_tokens"), given.get("grammar")
        temperature, top_p = given.get("temperature"), given.get("top_p")
        total = f"Given: {read} `inputs` tokens and {wanted} `max_new_tokens`"
        checks = {
            "`temperature` must be strictly positive": temperature is None or temperature > 0,
            "`top_p` must be > 0.0 and < 1.0": top_p is None or 0 < top_p < 1,
            "`max_new_tokens` must be strictly positive": wanted is None or wanted > 0,
            "`inputs` cannot be empty": inputs != "",
            f"`inputs` tokens + `max_new_tokens` must be <= {self.context}. {total}": self.context is None
            or read + (wanted or 0) <= self.context,
            "Grammar must have a 'properties' field": grammar is None
            or (grammar["type"] == "json" and "properties" in _parsed(grammar["value"])),
        }
        return next((said for said, sound in checks.items() if not sound), None)


class _Words:
    """A tokenizer, in the manner of the library `tokenizers`, whose tokens are words and special tokens."""

    @dataclass(frozen=True)
    class Encoding:
        tokens: list[str]
        offsets: list[tuple[int, int]]

        @property
        def ids(self) -> list[int]:
            return [int(digest_of(token)[:6], 16) for token in self.tokens]

    def __init__(self, bos: str | None = None) -> None:
        self.bos = bos
        self._pattern = re.compile("|".join([*([re.escape(bos)] if bos else []), r"<\|\w+\|>|(?:(?!<\|)\S)+"]))

    def encode(self, text: str, add_special_tokens: bool = True) -> "_Words.Encoding":
        found = list(self._pattern.finditer(text))
        added = [self.bos] if self.bos and add_special_tokens else []
        offsets = [(0, 0)] * len(added) + [match.span() for match in found]
        return self.Encoding(added + [match[0] for match in found], offsets)


def chat_ml(messages: Any, bos: str = "") -> str:
    """What a chat template makes of messages, with the turn of the assistant opened."""
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return bos + "".join(turns) + "<|im_start|>assistant\n"


def messages_in(text: str) -> list[dict[str, str]]:
    """The messages that a ChatML text was made of."""
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return [{"role": role, "content": content} for role, content in found]


@dataclass
class Endpoint:
    """A dedicated Inference Endpoint: its state in the control plane, and what answers at its own URL.

    Attributes:
        name: With its namespace.
        state: As the control plane calls it.
        polls: How often it is still looked at before it has started.
        becomes: The state it starts into.
        health: What `/health` answers with, in turn; the last one for good.
        refuses: By action (`get`, `resume`, `pause`): what the control plane answers to it.
        history: Every change of its state.
    """

    name: str
    state: str = "running"
    polls: int = 2
    becomes: str = "running"
    health: list[int] = field(default_factory=lambda: [200])
    repository: str = "org/teacher"
    revision: str = "0123abc"
    refuses: dict[str, Answer] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    def turn(self, state: str) -> None:
        """Takes it to another state."""
        self.state = state
        self.history.append(state)

    def seen(self) -> None:
        """Somebody looks: that is how time passes here."""
        if self.state == "initializing":
            self.polls -= 1
            if self.polls <= 0:
                self.turn(self.becomes)

    def raw(self, url: str) -> dict[str, Any]:
        """What the control plane says of it. It has a URL once it has run."""
        at = "2026-01-08T10:00:00.000Z"
        status = {"state": self.state, "message": "", "createdAt": at, "updatedAt": at, "readyReplica": 0}
        if self.state in ("running", "scaledToZero"):
            status["url"] = url
        return {
            "name": self.name.rpartition("/")[2],
            "type": "protected",
            "healthRoute": "/health",
            "provider": {"vendor": "aws", "region": "us-east-1"},
            "compute": {"accelerator": "gpu", "instanceType": "nvidia-l4", "instanceSize": "x1"},
            "model": {
                "repository": self.repository,
                "revision": self.revision,
                "framework": "pytorch",
                "task": "text-generation",
                "image": {"vLLM": {"url": "vllm/vllm-openai:v0.23.0", "port": 8000}},
            },
            "status": status,
        }


class HubServer(OracleServer):
    """What Hugging Face hosts, at one port: the Hub, the router of Inference Providers, Inference Endpoints.

    Attributes:
        rule: What to answer to a completion, of a provider or an endpoint, instead of the usual.
        token: The only one that is let in; null lets everybody in.
        served: By model and provider: the task it is served for.
        prices: By model and provider: what the router's list says under `pricing`.
        endpoints: By namespace and name.
    """

    def __init__(self, rule: Rule | None = None, *, token: str | None = None) -> None:
        super().__init__(rule)
        self.token = token
        self.served: dict[str, dict[str, str]] = {}
        self.prices: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.routes = {
            ("GET", "/v1/models"): self._list_priced,
            ("POST", "/v1/chat/completions"): self._routed,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[Call]:
        return [call for call in self.calls if call.path.endswith("/chat/completions")]

    def serve_model(self, model: str, **tasks: str) -> None:
        """Has providers serve a model, each for a task; the router calls them by their routes."""
        self.served[model] = {provider.replace("_", "-"): task for provider, task in tasks.items()}
        self.routes["GET", f"/api/models/{model}"] = self._model
        for provider in self.served[model]:
            self.routes["POST", f"/{provider}/v1/chat/completions"] = self._routed

    def add(self, endpoint: Endpoint) -> Endpoint:
        """Has an endpoint, with its routes in the control plane and at its own URL."""
        self.endpoints[endpoint.name] = endpoint
        plane, own = f"/v2/endpoint/{endpoint.name}", f"/at/{endpoint.name}"
        self.routes |= {
            ("GET", plane): lambda call: self._controlled(call, endpoint, "get"),
            ("POST", f"{plane}/resume"): lambda call: self._controlled(call, endpoint, "resume"),
            ("POST", f"{plane}/pause"): lambda call: self._controlled(call, endpoint, "pause"),
            ("GET", f"{own}/health"): lambda call: self._health(endpoint),
            ("GET", f"{own}/v1/models"): lambda call: self._asleep(endpoint) or self._list_models(call),
            ("POST", f"{own}/v1/chat/completions"): lambda call: self._asleep(endpoint) or self._routed(call),
        }
        return endpoint

    def _stranger(self, call: Call) -> Answer | None:
        if self.token is None or call.headers.get("authorization") == f"Bearer {self.token}":
            return None
        return Answer(401, {"error": "Invalid credentials in Authorization header"})

    def _model(self, call: Call) -> Answer:
        model = call.path.removeprefix("/api/models/")
        body: dict[str, Any] = {"_id": "0", "id": model}
        if "inferenceProviderMapping" in call.query.get("expand", []):
            body["inferenceProviderMapping"] = {
                provider: {"status": "live", "providerId": f"{provider}/{model}", "task": task}
                for provider, task in self.served[model].items()
            }
        return self._stranger(call) or Answer(body=body)

    def _list_priced(self, call: Call) -> Answer:
        listed = [
            {
                "id": model,
                "object": "model",
                "owned_by": model.partition("/")[0],
                "providers": [
                    {"provider": name, "status": "live", **({"pricing": prices[name]} if name in prices else {})}
                    for name in self.served[model]
                ],
            }
            for model in self.served
            for prices in [self.prices.get(model, {})]
        ]
        return Answer(body={"object": "list", "data": listed})

    def _routed(self, call: Call) -> Answer:
        return self._stranger(call) or self._complete(call)

    def _controlled(self, call: Call, endpoint: Endpoint, action: str) -> Answer:
        if refused := self._stranger(call) or endpoint.refuses.get(action):
            return refused
        if action == "get":
            endpoint.seen()
        elif action == "pause":
            endpoint.turn("paused")
        elif endpoint.state == "running":
            return Answer(400, {"error": "Endpoint is already running"})
        else:
            endpoint.turn("initializing")
        return Answer(body=endpoint.raw(f"{self.url}/at/{endpoint.name}"))

    def _health(self, endpoint: Endpoint) -> Answer:
        status = endpoint.health.pop(0) if len(endpoint.health) > 1 else endpoint.health[0]
        return self._asleep(endpoint) or Answer(status)

    def _asleep(self, endpoint: Endpoint) -> Answer | None:
        """What the proxy says in front of an endpoint that does not run; a request wakes one scaled to zero."""
        if endpoint.state == "scaledToZero":
            endpoint.turn("initializing")
        else:
            endpoint.seen()
        return None if endpoint.state == "running" else Answer(503, {"error": "503 Service Unavailable"})


# What can be answered.


def completion(call: Call, text: str | None = None, **choice: Any) -> Answer:
    """A completion in OpenAI's layout, by default the usual reflection; `choice` overrides parts of its choice."""
    text = reflection(call.body) if text is None else text
    words = sum(len(str(message["content"]).split()) for message in call.body["messages"])
    return Answer(
        body={
            "id": f"chatcmpl-{call.digest}",
            "object": "chat.completion",
            "created": 0,
            "model": call.body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                    "logprobs": None,
                    **choice,
                }
            ],
            "usage": {
                "prompt_tokens": words,
                "completion_tokens": len(text.split()),
                "total_tokens": words + len(text.split()),
            },
        }
    )


def error(status: int, message: str = "", *, retry_after: float | None = None) -> Answer:
    """An error in OpenAI's layout."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Answer(status, {"error": {"message": message or f"status {status} on order", "code": status}}, headers)


def generation(call: Call, text: str | None = None, *, tokenizer: Any = None, **details: Any) -> Answer:
    """A generation in TGI's layout, by default the usual reflection; `details` overrides parts of its details.

    As a real one it ends after a stop sequence, or with the last token that was asked for.
    """
    given = call.body.get("parameters") or {}
    text = reflection(_as_chat(call.body["inputs"], given.get("grammar"))) if text is None else text
    reason = "eos_token"
    stops = [text.index(stop) + len(stop) for stop in given.get("stop") or [] if stop in text]
    if stops:
        text, reason = text[: min(stops)], "stop_sequence"
    encoded = (tokenizer or _Words()).encode(text, add_special_tokens=False)
    most = given.get("max_new_tokens") or 1024
    if len(encoded.ids) > most:
        text, reason = text[: encoded.offsets[most - 1][1]], "length"
    spans = list(zip(encoded.ids, encoded.offsets, strict=True))[:most]
    tokens = [{"id": one, "text": text[slice(*span)], "logprob": -0.5, "special": False} for one, span in spans]
    counted = {"finish_reason": reason, "generated_tokens": len(tokens), "seed": given.get("seed")}
    body: dict[str, Any] = {"generated_text": text, "details": None}
    if given.get("details") or details:
        body["details"] = {**counted, "prefill": [], "tokens": tokens, **details}
    if given.get("return_full_text"):
        body["generated_text"] = call.body["inputs"] + text
    return Answer(body=body)


def tgi_error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error in TGI's layout."""
    return Answer(status, {"error": message, "error_type": kind}, headers or {})


TGI_ERRORS = {
    "validation": (422, "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000"),
    "overloaded": (429, "Model is overloaded"),
    "generation": (424, "Request failed during generation: Server error: CUDA out of memory"),
    "incomplete_generation": (500, "Incomplete generation"),
}
"""Status and words of TGI's own errors, by their type."""


def _as_chat(inputs: str, grammar: Mapping[str, Any] | None) -> dict[str, Any]:
    messages = messages_in(inputs) or [{"role": "user", "content": inputs}]
    if not grammar:
        return {"messages": messages}
    return {"messages": messages, "response_format": {"json_schema": {"schema": _parsed(grammar["value"])}}}


def _parsed(schema: Any) -> Mapping[str, Any]:
    return json.loads(schema) if isinstance(schema, str) else schema


def _streamed(answer: Answer) -> Answer:
    """A generation, or an error, as server-sent events; an error has the status 200 there."""
    if not isinstance(answer.body, dict):
        return answer
    events = [answer.body]
    if "generated_text" in answer.body:
        details = answer.body["details"]
        counted = {key: details[key] for key in ("finish_reason", "generated_tokens", "seed")}
        tokens = enumerate(details["tokens"], 1)
        events = [{"index": i, "token": token, "generated_text": None, "details": None} for i, token in tokens]
        events[-1] |= {"generated_text": answer.body["generated_text"], "details": {**counted, "input_length": 1}}
    chunks = tuple(f"data:{json.dumps(event)}\n\n".encode() for event in events)
    return replace(answer, status=200, body=chunks, headers={**answer.headers, "Content-Type": "text/event-stream"})


def _cut(where: str) -> Callable[[Call], Answer]:
    return lambda call: replace(completion(call), cut=where)


FAULTS: dict[str, Callable[[Call], Answer]] = {
    **{str(status): lambda call, s=status: error(s) for status in (400, 401, 403, 404, 429, 500, 502, 503)},
    "429-wait": lambda call: error(429, retry_after=1.5),
    "reset": _cut("before"),
    "reset-middle": _cut("middle"),
    "not-json": lambda call: Answer(body="<html>upstream is asleep</html>"),
    "truncated-json": lambda call: Answer(body=completion(call).payload[:-20]),
    "no-choices": lambda call: Answer(body={**completion(call).body, "choices": []}),
    "wrong-type": lambda call: replace(completion(call), headers={"Content-Type": "text/plain"}),
    "length": lambda call: completion(call, "It should be", finish_reason="length"),
    "content-filter": lambda call: completion(call, "", finish_reason="content_filter"),
    "refusal": lambda call: completion(call, "I'm sorry, but I can't help with that."),
    "empty": lambda call: completion(call, ""),
    "surrogate": lambda call: completion(call, "half a pair: \ud83d"),
    "hang": lambda call: Answer(hang=True),
}
"""Everything that goes wrong out there, by name."""


# The usual reflection.

_WORDS = """
    because the reader needs exact steps and a short example first we compare both sides then name the reason
    with numbers where they help such as three percent of cases finally say what remains open and why it matters
""".split()  # noqa: SIM905


def digest_of(body: Any) -> str:
    """A short hash of a request's body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def reflection(body: Any) -> str:
    """A plausible reflection in the layout that the prompt asks for: an eighth `[Unchanged]`, others long or short."""
    user, digest = body["messages"][-1]["content"].rstrip(), digest_of(body)
    chance = random.Random(digest)
    critique = f"Review {digest}: it could say more, and say it more plainly."
    unchanged, long = chance.random() < 1 / 8, chance.random() < 1 / 2
    instruction = f"{_subject(user)} Explain {' '.join(chance.choices(_WORDS, k=6))}, in {chance.randint(2, 9)} steps."
    response = " ".join(chance.choices(_WORDS, k=chance.randint(40, 160) if long else chance.randint(3, 12))) + "."
    if chance.random() < 1 / 4:
        response += "\n\n- one\n- two {with braces}"
    properties = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema", {}).get("properties")
    if properties:
        filled = {"critique": critique, "new_instruction": instruction, "new_input": "", "new_response": response}
        told = {name: "" if unchanged else filled[name] for name in properties if name in filled}
        return json.dumps({**told, "critique": critique, "already_good": unchanged})
    if user.endswith("[End]"):  # the `paper` layout
        if unchanged:
            return f"{critique}\n[Unchanged]"
        new = f"[New Instruction]\n{instruction}\n[End]\n" if "exactly these two blocks" in user[-600:] else ""
        return f"{critique}\n\n{new}[New Response]\n{response}\n[End]"
    if user.endswith("ALREADY GOOD"):  # the first stage of `staged`
        return "ALREADY GOOD" if unchanged else critique
    return instruction if "Rewrite the instruction" in user[-300:] else response


def _subject(user: str) -> str:
    found = re.search(r"### Instruction\n(.*?)(?:\n|$)", user)
    return (found[1] if found else user)[:60].strip()


def main() -> None:
    """Serves in this process until it is killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port-file", type=Path, required=True, help="where the port is written once it is open")
    parser.add_argument("--log", type=Path, help="where calls are recorded")
    parser.add_argument("--models", default="teacher", help="served models, separated by commas")
    parser.add_argument("--latency", type=float, default=0.0, help="mean seconds per completion")
    parser.add_argument("--fault", choices=FAULTS, help="what goes wrong")
    parser.add_argument("--every", type=int, default=1, help="which completions it happens to: each so-many-th")
    options = parser.parse_args()

    def rule(call: Call) -> Answer:
        faulty = options.fault and call.number % options.every == 0
        answer = FAULTS[options.fault](call) if faulty else completion(call)
        return replace(answer, delay=options.latency * 2 * random.Random(call.digest).random())

    async def serve() -> None:
        server = OracleServer(rule, tuple(options.models.split(",")), options.log)
        serving = asyncio.ensure_future(server.serve())
        while not server.port:
            await asyncio.sleep(0.01)
        unfinished = options.port_file.with_suffix(".part")
        unfinished.write_text(str(server.port))
        os.replace(unfinished, options.port_file)
        await serving

    asyncio.run(serve())


if __name__ == "__main__":
    main()
