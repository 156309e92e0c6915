# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-reflect"]
#
# [tool.hf-jobs]
# flavor = "l4x1"
# timeout = "12h"
# secrets = ["HF_TOKEN"]
# ///
"""Recycle a WizardLM-style dataset (instruction, output) and push the result.

An oracle LLM reflects on every pair, first on the instruction and then on the response; the student keeps the rewrites
it can learn from (Selective Reflection-Tuning, arXiv 2402.10110).

    hf jobs uv run --secrets HF_TOKEN \
        https://huggingface.co/datasets/uv-scripts/hf-reflect/raw/main/recycle_wizardlm.py \
        WizardLMTeam/WizardLM_evol_instruct_70k YOU/wizardlm-recycled \
        --oracle hf:Qwen/Qwen3-32B --student Qwen/Qwen2.5-0.5B

The same with Python, where hf-reflect is installed; an output that is a path with a slash in front or a dot is a
folder, and is not pushed:

    python recycle_wizardlm.py WizardLMTeam/WizardLM_evol_instruct_70k ./recycled --limit 100
"""

from hf_reflect.cli.script import run


if __name__ == "__main__":
    run("recycle", __doc__)
