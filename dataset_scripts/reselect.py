# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-reflect"]
#
# [tool.hf-jobs]
# flavor = "l4x1"
# timeout = "4h"
# secrets = ["HF_TOKEN"]
# ///
"""Select again among the rewrites of a recycled dataset, for another student, and push the result.

No oracle is asked: the rewrites are in the dataset's config `reflections`.

    hf jobs uv run --secrets HF_TOKEN \
        https://huggingface.co/datasets/uv-scripts/hf-reflect/raw/main/reselect.py \
        YOU/alpaca-recycled YOU/alpaca-recycled-for-llama --student meta-llama/Llama-3.2-1B

The same with Python, where hf-reflect is installed; an output that is a path with a slash in front or a dot is a
folder, and is not pushed:

    python reselect.py YOU/alpaca-recycled ./reselected --student Qwen/Qwen2.5-0.5B
"""

from hf_reflect.cli.script import run


if __name__ == "__main__":
    run("reselect", __doc__)
