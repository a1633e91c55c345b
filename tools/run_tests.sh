#!/usr/bin/env bash
# run_tests.sh PYTHON [pytest's arguments]: the tests that need no GPU, in two processes; then, alone, those that compare times.
set -euo pipefail
python=$1
shift
NOTHING=5 # pytest's exit code where no test was selected

run() {
    local status=0
    "$python" -m pytest -q "$@" || status=$?
    [[ $status == 0 || $status == "$NOTHING" ]] || exit "$status"
    [[ $status == "$NOTHING" ]] || found=1
}

found=
run -m "not gpu and not timing" -n 2 --dist loadfile "$@"
run -m "not gpu and timing" "$@"
[[ -n $found ]] || exit "$NOTHING"
