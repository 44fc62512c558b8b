#!/bin/sh
# Runs the tests and the notebooks at the same time, for `make test`. Many tests and some chapters use
# one core only, so that two cores are done sooner than one after the other. The output of the
# notebooks comes at the end. Fails if either of the two fails.
#
#   sh scripts/test.sh "command of the tests" "command of the notebooks"
set -u
log=$(mktemp)
notebooks=
trap 'rm -f "$log"' EXIT
trap 'kill $notebooks 2>/dev/null; exit 130' INT TERM

# A thread that waits must not keep a core busy that the other process could use.
export OMP_WAIT_POLICY=passive
eval "exec $2" >"$log" 2>&1 &
notebooks=$!
OMP_NUM_THREADS=1 sh -c "$1"
tests=$?
echo "The tests are done; waiting for the notebooks."
wait "$notebooks"
status=$?
cat "$log"
[ "$tests" -eq 0 ] && [ "$status" -eq 0 ]
