"""Oracles: one small client per protocol behind one Protocol."""

from typing import Any

from hf_reflect.embedded import embedded_model
from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import Oracle, Reply, Request, RowFailedError, Sampling


__all__ = ["Oracle", "Reply", "Request", "RowFailedError", "Sampling", "load_oracle"]


def load_oracle(spec: "str | Oracle", **options: Any) -> Oracle:
    """The oracle that a spec names.

    Args:
        spec: One of these, or an object that is an oracle already:

            - `local` (the embedded model), `local:PATH.gguf`;
            - `http(s)://HOST/v1`, an OpenAI-compatible server, with `#MODEL` where it serves several;
            - `tgi:URL`, TGI's own protocol;
            - `hf:MODEL` or `hf:MODEL@PROVIDER`, Inference Providers;
            - `endpoint:NAMESPACE/NAME`, an Inference Endpoint.
        **options: What the oracle takes: `concurrency` all of them; `timeout` and `api_key` servers; `model` and
            `pause_after` where they make sense. What is None counts as not given, what makes no sense is passed over.

    Raises:
        OracleError: the spec names none, or the oracle can't be used.
    """
    if not isinstance(spec, str):
        return spec
    kind, _, rest = spec.partition(":")
    if kind not in _TAKES:
        raise OracleError(
            f"oracle {spec!r}: not one of local, local:PATH.gguf, http(s)://HOST/v1, tgi:URL, hf:MODEL, "
            "endpoint:NAMESPACE/NAME. (replay:DATASET is taken by recycle and by transforms.)"
        )
    given = {name: value for name, value in options.items() if value is not None and name in _TAKES[kind]}
    if kind in ("local", "hf") and options.get("model"):
        raise OracleError(f"oracle {kind}: name another model as {_EXAMPLES[kind]}, not with --oracle-model.")
    if kind == "hf":
        from hf_reflect.oracles.hub import ProviderOracle

        return ProviderOracle(rest, **given)
    if kind == "endpoint":
        from hf_reflect.oracles.hub import EndpointOracle

        return EndpointOracle(rest, **given)
    if kind == "tgi":
        from hf_reflect.oracles.tgi import TGIOracle

        return TGIOracle(rest, **given)
    if kind == "local":
        from hf_reflect.oracles.local import LocalOracle

        oracle = LocalOracle(rest or embedded_model(), **given)
        oracle.spec = spec
        return oracle
    from hf_reflect.oracles.chat import ChatOracle

    url, _, model = spec.partition("#")
    return ChatOracle(url, **({"model": model} if model else {}) | given)


_SERVER = {"api_key", "concurrency", "timeout"}
_TAKES = {
    "local": {"concurrency"},
    "http": {*_SERVER, "model"},
    "https": {*_SERVER, "model"},
    "tgi": {*_SERVER, "model"},
    "hf": _SERVER,
    "endpoint": {*_SERVER, "model", "pause_after"},
}
_EXAMPLES = {"local": "local:PATH.gguf", "hf": "hf:MODEL@PROVIDER"}
