#!/bin/sh
# Runs the tests that depend on other packages, with other versions than those in constraints.txt and
# in a separate environment: `make test-oldest`, `make test-newest`. The version of PyTorch stays.
#
#   oldest       every package in the lowest version that pyproject.toml allows
#   newest       every package in the newest version that can be installed. Here the tests
#                of every architecture run too: one that is new in transformers lacks labels
#   TORCH_INDEX  as for scripts/set_up.sh
#   PYTEST_ARGS  options for pytest
set -eu
cd "$(dirname "$0")/.."

which=${1:-}
venv=.venv-$which
constraints=$venv/constraints.txt
packages='torch|transformers|peft|bitsandbytes|accelerate|datasets|huggingface_hub|tokenizers|numpy|pandas'
case $which in
oldest) bounds='print("\n".join(line.replace(">=", "==") for line in lines))' more='' ;;
newest) bounds='' more='tests/test_architectures.py tests/test_memory_caches.py' ;;
*)
    echo "usage: sh scripts/test_versions.sh oldest|newest" >&2
    exit 2
    ;;
esac

[ -x "$venv/bin/python" ] || .venv/bin/python -m venv "$venv"
grep '^torch==' constraints.txt >"$constraints"
"$venv/bin/python" -c "
import tomllib
with open('pyproject.toml', 'rb') as file:
    lines = tomllib.load(file)['project']['dependencies']
lines = [line for line in lines if not line.startswith('torch>')]
$bounds
" >>"$constraints"
"$venv/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint "$constraints" --editable '.[dev]'
"$venv/bin/python" -m pip freeze | grep -iE "^($packages)=="
exec env -u VLMKIT_MODEL -u MPLBACKEND HF_HUB_OFFLINE=1 \
    "$venv/bin/python" -m pytest -m "not slow" ${PYTEST_ARGS:-} \
    tests/test_versions.py tests/test_formats.py tests/test_plan.py tests/test_anatomy.py \
    tests/test_loading.py tests/test_quantizing.py tests/test_saving.py tests/test_linting.py \
    tests/test_memory.py tests/test_evaluation.py tests/test_finetuning.py tests/test_training.py \
    $more
