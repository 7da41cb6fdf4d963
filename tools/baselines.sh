#!/usr/bin/env bash
# Install other frameworks with the interpreter $1, each into a virtual environment of its own: bash tools/baselines.sh
# PYTHON NAME... installs BASELINES/NAME with what LOCKS/NAME.txt pins, unless it is there, and compiles what it would
# compile in its first run. One that cannot be installed is reported, and the others go on; the exit code is then 1.
set -uo pipefail
python=$1
shift
cd "$(dirname "$0")/.."
locks=${LOCKS:-baselines/environments} baselines=${BASELINES:-.baselines} scripts=${SCRIPTS:-baselines/ranks}

# Whether every version of the list $2 is what the environment $1 has; says the first that is not.
agrees() {
    "$1/bin/python" - "$2" <<'PYTHON'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1]):
    if found := re.match(r"([\w.-]+)==(\S+)", line):
        name, pinned = found.groups()
        try:
            # The local part ("+cpu") names the build.
            here = version(name).partition("+")[0]
        except PackageNotFoundError:
            here = "not installed"
        if here != pinned:
            sys.exit(f"{name}: {here}, {pinned} is asked for")
PYTHON
}

# Make the environment $1 anew, with the list $2; the pip of our own installs into it.
create() {
    "$python" -m venv --clear --without-pip "$1" && bash tools/torch.sh "$1" "$2" "$python" &&
        "$python" -m pip --python "$1/bin/python" --disable-pip-version-check install --quiet -r "$2" && agrees "$1" "$2"
}

# Run SCRIPTS/NAME_build.py in the environment $2 of the framework $1, where there is one, unless that was done.
build() {
    local script=$scripts/$1_build.py done=$2/built
    [ ! -f "$script" ] || [ "$done" -nt "$script" ] || {
        command -v ${CXX:-c++} || {
            echo "there is no C++ compiler ('${CXX:-c++}'): install one (Debian: apt-get install g++), or name it with CXX"
            return 1
        }
        # By the path by which it is run: for another one everything is compiled anew.
        "$(realpath "$2")/bin/python" "$script" && touch "$done"
    }
}

# Say that $1 failed, and how the log $2 ends.
failure() {
    failed+=("$1")
    echo "$1: $3; $2 ends with:" >&2
    grep -v '^WARNING: ' "$2" | tail -n 5 | sed 's/^/    /' >&2
}

if [ $# -eq 0 ]; then
    echo "no framework is named" >&2
    exit 2
fi
for name in "$@"; do
    if [ ! -f "$locks/$name.txt" ]; then
        echo "there is no framework '$name' to install; known are: $(basename -s .txt "$locks"/*.txt | xargs)" >&2
        exit 2
    fi
done

failed=()
for name in "$@"; do
    folder=$baselines/$name lock=$locks/$name.txt log=$baselines/$name.log
    mkdir -p "$baselines"
    if agrees "$folder" "$lock" >/dev/null 2>&1; then
        echo "$name: is there"
    else
        echo "$name: installing ($log)"
        started=$SECONDS
        create "$folder" "$lock" >"$log" 2>&1 || {
            failure "$name" "$log" "not installed"
            continue
        }
        echo "$name: installed in $((SECONDS - started)) s"
        rm "$log"
    fi
    build "$name" "$folder" >"$folder/build.log" 2>&1 ||
        failure "$name" "$folder/build.log" "what it compiles in its first run could not be compiled"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "not usable: ${failed[*]}; everything else is" >&2
    exit 1
fi
