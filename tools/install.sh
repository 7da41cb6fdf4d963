#!/usr/bin/env bash
# Install the suite into the virtual environment $1 with the extras $2, versions pinned by constraints.txt.
set -euo pipefail
venv=$1 extras=$2
cd "$(dirname "$0")/.."

"$venv/bin/python" -c 'import torch' 2>/dev/null || bash tools/torch.sh "$venv" constraints.txt
echo "installing the suite"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt --editable ".[$extras]"
