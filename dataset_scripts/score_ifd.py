# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-reflect"]
#
# [tool.hf-jobs]
# flavor = "l4x1"
# timeout = "4h"
# secrets = ["HF_TOKEN"]
# ///
"""Score an instruction dataset by IFD, reversed IFD and IRA under a student, and push it with the scores.

No oracle is asked (arXiv 2308.12032, 2402.10110). Select from the result with `hf-reflect select`.

    hf jobs uv run --secrets HF_TOKEN \
        https://huggingface.co/datasets/uv-scripts/hf-reflect/raw/main/score_ifd.py \
        tatsu-lab/alpaca YOU/alpaca-scored --student Qwen/Qwen2.5-0.5B

The same with Python, where hf-reflect is installed; an output that is a path with a slash in front or a dot is a
folder, and is not pushed:

    python score_ifd.py tatsu-lab/alpaca ./scored --limit 100
"""

from hf_reflect.cli.script import run


if __name__ == "__main__":
    run("score", __doc__)
