"""Recycle instruction data: an oracle LLM reflects on every pair, the student keeps what it can learn from.

Heavy libraries (torch, transformers, datasets) are imported when something needs them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any


__version__ = version("hf-reflect")

_HOMES = {
    "recycle": "hf_reflect.recycling",
    "Recycled": "hf_reflect.recycling",
    "ReflectInstruction": "hf_reflect.transforms",
    "ReflectResponse": "hf_reflect.transforms",
    "ScoreIFD": "hf_reflect.transforms",
    "ScoreReversedIFD": "hf_reflect.transforms",
    "SelectInstruction": "hf_reflect.transforms",
    "SelectResponse": "hf_reflect.transforms",
    "reselect": "hf_reflect.reselecting",
    "estimate": "hf_reflect.estimating",
    "Estimate": "hf_reflect.estimating",
    "Limits": "hf_reflect.oracles.pace",
    "Guards": "hf_reflect.guards",
    "push_recycled": "hf_reflect.hub",
    "load_recycled": "hf_reflect.loading",
    "list_recycled": "hf_reflect.loading",
    "register": "hf_reflect.loading",
    "verify": "hf_reflect.verifying",
    "describe": "hf_reflect.describing",
    "Description": "hf_reflect.describing",
    "compare": "hf_reflect.comparing",
    "draw": "hf_reflect.plotting",
    "write_report": "hf_reflect.report",
    "select_from_analysis": "hf_reflect.analysis",
    "score": "hf_reflect.scoring",
    "select": "hf_reflect.scoring",
    "TopFraction": "hf_reflect.ranking",
    "KeepRecycled": "hf_reflect.transforms",
    "Prompts": "hf_reflect.prompts",
    "Sampling": "hf_reflect.oracles",
    "load_oracle": "hf_reflect.oracles",
    "load_student": "hf_reflect.student",
    "Student": "hf_reflect.student",
    "Journal": "hf_reflect.journal",
    "HfReflectError": "hf_reflect.errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
