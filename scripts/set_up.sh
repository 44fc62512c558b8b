#!/bin/sh
# Creates .venv with everything that the course and its tests need, in the tested versions. `make`
# calls this before every target. It does nothing if nothing has changed.
#
#   PYTHON       the Python to use, 3.11 or newer; found by itself if not given
#   TORCH_INDEX  one more package index to look for PyTorch in, e.g. one with CPU or CUDA builds
set -eu
cd "$(dirname "$0")/.."

venv=.venv
begun=$venv/.begun # exists while a set-up runs, and after one that failed or was interrupted
ready=$venv/.ready # exists after a good set-up; contains its folder and its requirements
folder=$(pwd -P)
cobble=vlmkit/models/cobble # where its weights change, its checkpoints are put together again
requirements=$(cat pyproject.toml constraints.txt $cobble/recipe.py $cobble/weights/* 2>/dev/null |
    cksum)

runs() { "$venv/bin/python" -c "" 2>/dev/null; }

if [ -e "$ready" ] && [ "$(cat "$ready")" = "$folder
$requirements" ] && runs; then
    exit 0
fi

# pip thinks that a half unpacked package is installed, and an environment that was moved or copied
# still imports from its old folder. Neither can be repaired, so .venv is made again.
if [ -e "$begun" ]; then
    echo "The last set-up did not finish. Starting again."
    rm -rf "$venv"
elif [ -e "$ready" ] && { [ "$(head -n 1 "$ready")" != "$folder" ] || ! runs; }; then
    echo "$venv was made for another folder, or its Python is gone. Starting again."
    rm -rf "$venv"
fi

if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- python3.11 python3.12 python3.13 python3.14 python3 python
fi
found=""
chosen=""
for python in "$@"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        found="$found  $python is Python $version
"
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        found="$found  $python ($version) lacks the venv module; Debian and Ubuntu: apt install python3-venv
"
    else
        chosen=$python
        break
    fi
done
if [ -z "$chosen" ]; then
    echo "vlmkit needs Python 3.11 or newer, with the venv module. Found:" >&2
    printf '%s' "${found:-  no Python at all${PYTHON:+ under the name $PYTHON}
}" >&2
    echo "Install one, or name one: make lab PYTHON=/path/to/python3.11" >&2
    exit 1
fi

echo "Setting up $venv with $chosen ($version). The first time takes minutes."
mkdir -p "$venv"
rm -f "$ready"
touch "$begun"
"$chosen" -m venv "$venv"
# One call, so that pip respects the pin of torch. Otherwise it downloads gigabytes of the newest.
"$venv/bin/python" -m pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    --no-compile --constraint constraints.txt --editable '.[course,dev,site]'
# pip compiles with one core. Some packages contain files that no Python 3 can compile.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
printf '%s\n%s\n' "$folder" "$requirements" >"$ready"
rm -f "$begun"
"$venv/bin/python" -m vlmkit fetch cobble ||
    echo "cobble is missing, so the course runs with pebble. To try again: $venv/bin/vlmkit fetch cobble"
