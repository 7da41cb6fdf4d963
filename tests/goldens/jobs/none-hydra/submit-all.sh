#!/usr/bin/env bash
# Submits every job of this folder that has not finished, does not wait and does not run. It needs the environment of
# the suite: axonn remembers the ids, so that nothing is submitted twice.
set -euo pipefail
exec axonn submit "$(dirname "$0")" "$@"
