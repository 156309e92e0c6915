"""Oracles that Hugging Face hosts: Inference Providers and dedicated Inference Endpoints."""

import logging
import os
from typing import Any

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import close_all
from hf_reflect.oracles.chat import API_KEY_VARIABLE, ChatClient, ChatOracle
from hf_reflect.oracles.faults import read_fault, redact


_LOG = logging.getLogger(__name__)
_SCALE_UP = 600
"""Seconds that the proxy of an endpoint holds a request while the endpoint starts."""


class ProviderOracle(ChatClient):
    """Asks a model on Inference Providers.

    Args:
        model: The model's Hub id, with `@PROVIDER` for one provider; else the router chooses.
        api_key: By default the environment variable `HF_REFLECT_API_KEY`, or your Hugging Face token.
        concurrency: Calls in flight at once.
        timeout: Seconds to wait for one reply.

    Raises:
        OracleError: you are not logged in, or no provider serves the model.
    """

    def __init__(
        self, model: str, *, api_key: str | None = None, concurrency: int = 16, timeout: float = 600.0
    ) -> None:
        spec, (name, _, provider) = f"hf:{model}", model.partition("@")
        key = api_key or os.environ.get(API_KEY_VARIABLE) or _token(spec)
        # A provider's own key is for that provider; Hugging Face must not see it.
        self._hub_token = key if key.startswith("hf_") else None
        self.provider = provider or "auto"
        if not provider and self._hub_token is None:
            raise OracleError(f"oracle {spec}: the key is a provider's own; name it, as hf:{name}@PROVIDER.")
        _check_provider(spec, name, provider, self._hub_token)
        super().__init__(spec, name, {"provider": self.provider, "api_key": key, "timeout": timeout}, concurrency)

    @property
    def identity(self) -> dict[str, Any]:
        """The model, and the provider where one was named."""
        return {"kind": "hf", "model": self.name, "provider": self.provider}

    def price(self) -> tuple[float, float] | None:
        """The published prices per million tokens read and written, in US dollars; null if there are none.

        With several providers to choose from, the highest: the router says after the call which one it was.
        """
        from huggingface_hub import constants

        from hf_reflect.oracles.chat import get

        base = constants.INFERENCE_PROXY_TEMPLATE.partition("/{")[0]
        try:
            _, _, data = get(f"{base}/v1/models", self.spec, self._hub_token)
            prices = [
                (float(offer["pricing"]["input"]), float(offer["pricing"]["output"]))
                for model in data["data"]
                if model["id"] == self.name
                for offer in model["providers"]
                if offer.get("pricing") and self.provider in ("auto", offer.get("provider"))
            ]
        except (OracleError, KeyError, TypeError, ValueError, AttributeError):
            return None  # it is only for an estimate, which can do without
        return (max(read for read, _ in prices), max(written for _, written in prices)) if prices else None


class EndpointOracle(ChatOracle):
    """Asks a dedicated Inference Endpoint, which is woken if it sleeps.

    Args:
        name: `NAMESPACE/NAME`.
        model: The model's name at the endpoint; may be left out where it serves a single one.
        pause_after: Pause the endpoint when the run ends, also when it fails.
        api_key: By default the environment variable `HF_REFLECT_API_KEY`, or your Hugging Face token.
        concurrency: Calls in flight at once.
        timeout: Seconds to wait for one reply.
        wake: Seconds to wait for the endpoint to run.

    Raises:
        OracleError: there is no such endpoint, or it can't be started.
    """

    def __init__(
        self,
        name: str,
        model: str | None = None,
        *,
        pause_after: bool = False,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        wake: int = 1800,
    ) -> None:
        spec = f"endpoint:{name}"
        key = api_key or os.environ.get(API_KEY_VARIABLE) or _token(spec)
        self.endpoint_name, self.pause_after = name, pause_after
        self._endpoint = _Endpoint(spec, name, key)
        try:
            self._endpoint.wake(wake)
            headers = {"X-Scale-Up-Timeout": str(_SCALE_UP)}
            address = f"{self._endpoint.url.rstrip('/')}/v1"
            super().__init__(
                address, model, api_key=key, concurrency=concurrency, timeout=timeout + _SCALE_UP, headers=headers
            )
        except BaseException:
            close_all([self])
            raise
        self.spec = spec

    @property
    def identity(self) -> dict[str, Any]:
        """The endpoint's name with what it serves; its URL changes when it is made anew."""
        return {"kind": "endpoint", "endpoint": self.endpoint_name, "model": self.name, **self._endpoint.serves}

    def close(self) -> None:
        """Ends the use of the endpoint: pauses it if that was asked for."""
        if self.pause_after:
            self._endpoint.pause()


class _Endpoint:
    """An endpoint's control plane, with errors that say what to do."""

    def __init__(self, spec: str, name: str, token: str) -> None:
        from huggingface_hub import HfApi

        namespace, _, short = name.rpartition("/")
        if not namespace or not short:
            raise OracleError(f"oracle {spec}: write it as endpoint:NAMESPACE/NAME.")
        self.spec, self._token = spec, token
        api = HfApi(token=token)
        self._endpoint = self._call(lambda: api.get_inference_endpoint(short, namespace=namespace))

    @property
    def url(self) -> str:
        url: str | None = self._endpoint.url
        if not url:
            raise OracleError(f"oracle {self.spec}: it has no URL yet; look at it on endpoints.huggingface.co.")
        return url

    @property
    def serves(self) -> dict[str, Any]:
        return {"repository": self._endpoint.repository, "revision": self._endpoint.revision}

    def wake(self, seconds: int) -> None:
        status = str(getattr(self._endpoint.status, "value", self._endpoint.status))
        if status == "running":
            return
        _LOG.warning("endpoint %s is %s: waking it, which may take minutes", self._endpoint.name, status)
        if status in ("paused", "scaledToZero"):
            self._call(self._endpoint.resume)
        self._call(lambda: self._endpoint.wait(timeout=seconds, refresh_every=2))

    def pause(self) -> None:
        _LOG.warning("pausing endpoint %s", self._endpoint.name)
        self._call(self._endpoint.pause)

    def _call(self, action: Any) -> Any:
        from huggingface_hub.errors import InferenceEndpointError

        try:
            return action()
        except InferenceEndpointError as error:  # it failed to start, or not in time
            said = redact(" ".join(str(error).split()), [self._token])
            raise OracleError(f"oracle {self.spec}: {said} Look at its logs on endpoints.huggingface.co.") from error
        except (KeyError, TypeError, AttributeError) as error:  # from within huggingface_hub
            raise OracleError(f"oracle {self.spec}: the control plane answers in an unknown shape.") from error
        except Exception as error:
            fault = read_fault(error, [self._token])
            if fault is None:
                raise
            said = redact(fault.message, [self._token])
            raise OracleError(
                f"oracle {self.spec}: {said}. Check the name, and that your token may use it."
            ) from error


def _token(spec: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise OracleError(f"oracle {spec}: you are not logged in. Run `hf auth login`, or set {API_KEY_VARIABLE}.")
    return token


def _check_provider(spec: str, model: str, provider: str, token: str | None) -> None:
    """Refuses what no provider serves, before anything is asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
        mapping = HfApi(token=token).model_info(model, expand=["inferenceProviderMapping"]).inference_provider_mapping
        serving = [offer.provider for offer in mapping or () if offer.task == "conversational"]
    except HFValidationError as error:
        raise OracleError(f"oracle {spec}: write it as hf:NAMESPACE/NAME or hf:NAMESPACE/NAME@PROVIDER.") from error
    except (KeyError, TypeError, AttributeError) as error:  # from within huggingface_hub
        raise OracleError(f"oracle {spec}: the Hub answers in an unknown shape.") from error
    except Exception as error:
        secrets = [token] if token else []
        fault = read_fault(error, secrets)
        if fault is None:
            raise
        said = redact(fault.message, secrets)
        raise OracleError(f"oracle {spec}: the Hub says {said}. Check the model's name.") from error
    if not serving:
        raise OracleError(f"oracle {spec}: no Inference Provider serves this model as a chat model.")
    if provider and provider not in serving:
        raise OracleError(f"oracle {spec}: {provider} does not serve this model; {', '.join(serving)} do.")
    if provider and provider not in _known_providers():
        raise OracleError(f"oracle {spec}: the installed huggingface_hub does not know {provider}; update it.")


def _known_providers() -> tuple[str, ...]:
    from huggingface_hub.inference._providers import PROVIDERS

    return tuple(PROVIDERS)
