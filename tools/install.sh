#!/usr/bin/env bash
# Install the suite into the virtual environment $1 with the extras $2, versions pinned by constraints.txt.
#
# On Linux, PyPI's torch brings several GB of CUDA libraries. Without an NVIDIA GPU the CPU build is taken instead,
# from TORCH_CPU_INDEX, unless pip's own configuration already leads to a build without them.
set -euo pipefail
venv=$1 extras=$2
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
cd "$(dirname "$0")/.."
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

wants_cuda() {
    local report
    report=$("${pip[@]}" install --quiet --dry-run --no-deps --ignore-installed --report - -c constraints.txt torch)
    grep -q '"nvidia-' <<<"$report"
}

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if nvidia-smi -L >/dev/null 2>&1 || [ "$(uname -s)" != Linux ] || ! wants_cuda; then
        echo "installing torch"
        "${pip[@]}" install --quiet -c constraints.txt torch
    else
        echo "installing torch, CPU build (no NVIDIA GPU here)"
        "${pip[@]}" install --quiet -c constraints.txt --extra-index-url "$index" "torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu" || {
            echo "the CPU build cannot be had from $index; taking PyPI's build with CUDA (set TORCH_CPU_INDEX to avoid it)"
            "${pip[@]}" install --quiet -c constraints.txt torch
        }
    fi
fi
echo "installing the suite"
"${pip[@]}" install --quiet -c constraints.txt --editable ".[$extras]"
