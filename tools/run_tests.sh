#!/usr/bin/env bash
# run_tests.sh PYTHON [pytest's arguments]: the tests that need no GPU, in two processes; then, alone, those marked so.
set -euo pipefail
python=$1
shift
NOTHING=5 # pytest's exit code where no test was selected
export OMP_NUM_THREADS=1 # programs that tests start do not wait for each other's threads

run() {
    local status=0
    "$python" -m pytest -q "$@" || status=$?
    [[ $status == 0 || $status == "$NOTHING" ]] || exit "$status"
    [[ $status == "$NOTHING" ]] || found=1
}

found=
run -m "not gpu and not alone" -n 2 --dist loadfile "$@"
run -m "not gpu and alone" "$@"
[[ -n $found ]] || exit "$NOTHING"
