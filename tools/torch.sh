#!/usr/bin/env bash
# Install torch into the virtual environment $1, in the version that the list $2 pins (as of `pip freeze`), with its own
# pip or that of the interpreter $3.
#
# On Linux, PyPI's torch brings several GB of CUDA libraries. Without an NVIDIA GPU the CPU build is taken instead,
# from TORCH_CPU_INDEX, unless pip's own configuration already leads to a build without them.
set -euo pipefail
venv=$1 pins=$2
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
pip=("${3:-$venv/bin/python}" -m pip --python "$venv/bin/python" --disable-pip-version-check)

wants_cuda() {
    local report
    report=$("${pip[@]}" install --quiet --dry-run --no-deps --ignore-installed --report - -c "$pins" torch)
    grep -q '"nvidia-' <<<"$report"
}

if nvidia-smi -L >/dev/null 2>&1 || [ "$(uname -s)" != Linux ] || ! wants_cuda; then
    echo "installing torch"
    "${pip[@]}" install --quiet -c "$pins" torch
else
    echo "installing torch, CPU build (no NVIDIA GPU here)"
    "${pip[@]}" install --quiet -c "$pins" --extra-index-url "$index" "torch==$(sed -n 's/^torch==//p' "$pins")+cpu" || {
        echo "the CPU build cannot be had from $index; taking PyPI's build with CUDA (set TORCH_CPU_INDEX to avoid it)"
        "${pip[@]}" install --quiet -c "$pins" torch
    }
fi
