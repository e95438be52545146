# Sourced by contrib/demo and contrib/test: checks what the machine has, and makes a virtual environment.
#
# Sets PYTHON (the interpreter found) and VENV (the environment, made by make_venv).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${P2POOL_VENV:-$ROOT/.venv}

# Says everything that is missing, each with the command that installs it, and stops.
check_machine() {
    local missing=0 candidate
    PYTHON=
    for candidate in ${P2POOL_PYTHON:+"$P2POOL_PYTHON"} python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            PYTHON=$candidate
            break
        fi
    done
    if [ -z "$PYTHON" ]; then
        echo "missing: Python 3.11, 3.12 or 3.13. On Debian: apt-get install python3 python3-venv" >&2
        missing=1
    elif ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "missing: Python's venv module. On Debian: apt-get install python3-venv" >&2
        missing=1
    fi
    if ! command -v cc >/dev/null; then
        echo "missing: a C compiler, which the Rust toolchain links with. On Debian: apt-get install build-essential" >&2
        missing=1
    fi
    local cargo_home=${CARGO_HOME:-${HOME:-/root}/.cargo} cargo_version=
    if ! command -v cargo >/dev/null && [ -x "$cargo_home/bin/cargo" ]; then
        PATH="$cargo_home/bin:$PATH"
    fi
    if ! command -v cargo >/dev/null; then
        echo "missing: a Rust toolchain (1.89 or later). Install rustup (on Debian 13 and later: apt-get install rustup)," >&2
        echo "         then: rustup default stable" >&2
        missing=1
    elif ! cargo_version=$(cargo --version 2>/dev/null); then
        echo "missing: a Rust toolchain (1.89 or later); rustup is there: rustup default stable" >&2
        missing=1
    elif ! echo "$cargo_version" | awk '{ split($2, v, "."); exit !(v[1] > 1 || v[2] >= 89) }'; then
        echo "too old: $cargo_version; Rust 1.89 or later is needed: rustup update stable" >&2
        missing=1
    fi
    [ "$missing" = 0 ] || exit 1
}

# Makes the virtual environment if it is not there, or is one that does not work or of another Python.
make_venv() {
    local version='import sys; print(sys.version_info[:2])'
    if [ "$("$VENV/bin/python" -c "$version" 2>/dev/null)" = "$("$PYTHON" -c "$version")" ] &&
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        echo "$VENV is not empty and no virtual environment: name another one in P2POOL_VENV" >&2
        exit 1
    fi
    "$PYTHON" -m venv --clear "$VENV"
}
