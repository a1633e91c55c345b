#!/usr/bin/env bash
# Make (or bring up to date) the project's virtual environment .venv; `make setup` runs this.
#
#   tools/setup_env.sh [PYTHON]      PYTHON: the interpreter that creates .venv (default python3, 3.11 or newer)
#   TORCH=auto|cpu|cuda              which build of torch: auto (default) takes cuda where `nvidia-smi -L` lists a GPU
#
# The versions come from constraints.txt. PyPI's torch for Linux brings gigabytes of CUDA libraries, hence the CPU wheel
# where there is no GPU: from wherever pip is set up to look, else from PyTorch's own index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly PYTHON=${1:-python3}
readonly VENV_PYTHON=.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*"; }

die() { # first line: what is wrong; further lines: what to do
    printf 'setup: error: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '       %s\n' "$@" >&2
    exit 1
}

pip() { "$VENV_PYTHON" -m pip "$@"; }

check_python() {
    command -v "$PYTHON" >/dev/null ||
        die "there is no '$PYTHON' here" "Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.12"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "'$PYTHON' is $("$PYTHON" --version 2>/dev/null || echo unusable), and Python 3.11 or newer is needed" \
            "Name one: make setup PYTHON=/path/to/python3.12"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "'$PYTHON' cannot create virtual environments" \
            "On Debian and Ubuntu: apt-get install python3-venv (or python3.X-venv for the version you use)"
}

make_venv() {
    # The scripts inside name the folder they were made for, so a moved or copied .venv is made again.
    if [[ -x $VENV_PYTHON ]] && grep -qsF "$(pwd -P)/.venv" .venv/bin/activate && pip --version >/dev/null 2>&1; then
        return
    fi
    check_python
    say "creating .venv with $("$PYTHON" --version 2>&1)"
    "$PYTHON" -m venv --clear .venv || die "could not create .venv" "The reason is above; is the disk full or read-only?"
}

torch_build() {
    local build=${TORCH:-auto}
    if [[ $build == auto ]]; then
        build=cpu
        [[ $(nvidia-smi -L 2>/dev/null || true) != GPU* ]] || build=cuda
    fi
    [[ $build == cpu || $build == cuda ]] || die "TORCH=$build is none of auto, cpu, cuda"
    printf '%s\n' "$build"
}

installed_torch() { "$VENV_PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

install_torch() { # $1: cpu or cuda, $2: version
    local build=$1 version=$2 have
    have=$(installed_torch)
    if [[ ${have%%+*} == "$version" && ! ($build == cuda && $have == *+cpu) ]]; then
        say "torch $have is there already"
    elif [[ $build == cuda ]]; then
        say "installing torch $version for CUDA (several GB: some minutes)"
        pip install -c constraints.txt "torch===$version" # === because == would take a local +cpu build, too
    elif [[ $(uname -s) == Darwin ]]; then
        say "installing torch $version"
        pip install --no-deps "torch==$version"
    else
        say "installing torch $version for CPUs (about 200 MB)"
        # Dependencies come with the engine below, from the usual index and as constraints.txt says.
        pip install --quiet --no-deps "torch==$version+cpu" 2>/dev/null || {
            say "not on the usual package index: trying $CPU_INDEX"
            pip install --no-deps --index-url "$CPU_INDEX" "torch==$version+cpu"
        }
    fi || die "could not install torch $version ($build)" \
        "pip's reason is above: usually no network, a full disk, or no build of this torch for $("$VENV_PYTHON" --version)" \
        "(then name another: make setup PYTHON=...). TORCH=cuda takes PyPI's build, which is larger and runs on CPUs too."
}

main() {
    local build version extras=test
    version=$(sed -n 's/^torch==//p' constraints.txt)
    build=$(torch_build)
    [[ $build == cpu ]] || extras=test,cuda
    make_venv
    install_torch "$build" "$version"
    say "installing the engine and what it needs (about 400 MB)"
    pip install --quiet -c constraints.txt -e ".[$extras]" ||
        die "could not install the engine" "pip's reason is above. No network or a full disk are the usual ones." \
            "To start afresh: rm -rf .venv && make setup"
    # From another folder, so that only what was installed can answer.
    (cd / && "$OLDPWD/$VENV_PYTHON" -c 'import liveavatar_engine, liveavatar_kernels, torch') ||
        die "the environment does not work: the import above failed" "To start afresh: rm -rf .venv && make setup"
    if [[ $build == cuda ]] && ! "$VENV_PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        say "warning: torch cannot use the GPU (its driver is usually too old): the engine will run on the CPU"
    fi
    say "done: .venv holds torch $(installed_torch) and the engine"
}

main
