"""Oracles: one small client per protocol behind one Protocol."""

from typing import Any

from hf_reflect.embedded import embedded_model
from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import Oracle, Reply, Request, RowFailedError, Sampling


__all__ = ["Oracle", "Reply", "Request", "RowFailedError", "Sampling", "load_oracle"]


def load_oracle(spec: "str | Oracle", **options: Any) -> Oracle:
    """The oracle that a spec names.

    Args:
        spec: `local` (the embedded model), `local:PATH.gguf`, the URL of an OpenAI-compatible server, or an object
            that is an oracle already.
        **options: For a server: `model`, `api_key`, `concurrency`, `timeout`. For `local`: `concurrency`. What is
            None counts as not given.

    Raises:
        OracleError: the spec names none, or the oracle can't be used.
    """
    if not isinstance(spec, str):
        return spec
    options = {name: value for name, value in options.items() if value is not None}
    if spec.startswith(("http://", "https://")):
        from hf_reflect.oracles.chat import ChatOracle

        return ChatOracle(spec, **options)
    kind, _, path = spec.partition(":")
    if kind == "local":
        from hf_reflect.oracles.local import LocalOracle

        if "model" in options:
            raise OracleError("oracle local: name another model as local:PATH.gguf, not with --oracle-model.")
        oracle = LocalOracle(path or embedded_model(), **options)
        oracle.spec = spec
        return oracle
    raise OracleError(f"oracle {spec!r}: not one of local, local:PATH.gguf, http(s)://HOST/v1.")
