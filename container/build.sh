#!/usr/bin/env bash
# build.sh: build a container image of this project with Docker. `build.sh --help` lists the flags.
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "$0")")")

usage() {
  cat <<'HELP'
usage: container/build.sh [FLAG ...]

  --framework NAME         VLLM (default; NVIDIA GPUs; VLLM_V1 is the same), VLLM_NIXL (the same with NIXL) or CPU;
                           case-insensitive
  --target STAGE           build this stage of the Dockerfile (builder, runtime) and append it to the tag
  --tag NAME:TAG           image name, default dynamo:latest-<framework>[-<target>]; can be repeated
  --release-build          also tag it dynamo:<version>-<framework>[-<target>]
  --base-image NAME        base image, default python
  --base-image-tag TAG     its tag, default 3.12-slim-bookworm (CPU: 3.11-slim-bookworm)
  --platform PLATFORM      such as linux/amd64; default: this machine's
  --build-arg NAME=VALUE   passed to docker build, like the next four; can be repeated
  --build-context NAME=DIR
  --cache-from SOURCE
  --cache-to TARGET
  --no-cache
  --dry-run                print the docker command and exit
  -h, -?, --help           show this

  ./container/build.sh                                  # dynamo:latest-vllm
  ./container/build.sh --framework cpu                  # dynamo:latest-cpu
  ./container/build.sh --framework vllm_nixl            # dynamo:latest-vllm, with NIXL in it
HELP
}
fail() { printf 'error: %s\n' "$1" >&2; exit "${2:-1}"; }
misuse() { printf 'error: %s\n\n' "$1" >&2; usage >&2; exit 2; }

framework=VLLM target='' release='' dry_run='' tags=() args=()
while [ $# -gt 0 ]; do
  case $1 in
    --framework | --target | --tag | --base-image | --base-image-tag | --platform | --build-arg | --build-context | \
      --cache-from | --cache-to)
      { [ $# -ge 2 ] && [ -n "$2" ] && [[ $2 != -* ]]; } || misuse "$1 needs a value" ;;&
    --framework) framework=${2^^}; shift ;;
    --target) target=$2; args+=(--target "$2"); shift ;;
    --tag) tags+=("$2"); shift ;;
    --base-image) args+=(--build-arg "BASE_IMAGE=$2"); shift ;;
    --base-image-tag) args+=(--build-arg "BASE_IMAGE_TAG=$2"); shift ;;
    --platform | --build-arg | --build-context | --cache-from | --cache-to) args+=("$1" "$2"); shift ;;
    --no-cache) args+=(--no-cache) ;;
    --release-build) release=yes ;;
    --dry-run) dry_run=yes ;;
    -h | -\? | --help) usage; exit 0 ;;
    *) misuse "unknown flag: $1" ;;
  esac
  shift
done

case $framework in
  CPU | VLLM) ;;
  VLLM_V1) framework=VLLM ;; # vLLM has one engine now
  VLLM_NIXL) framework=VLLM; args+=(--build-arg ENABLE_NIXL=true) ;;
  TENSORRTLLM | TRTLLM | SGLANG) misuse "--framework $framework: the engine here is vLLM; use VLLM or CPU" ;;
  STANDARD | NONE) misuse "--framework $framework: there is no image without an engine; CPU runs on any machine" ;;
  *) misuse "unknown framework: $framework; use VLLM, VLLM_NIXL or CPU" ;;
esac

name=${framework,,}${target:+-$target}
[ ${#tags[@]} -gt 0 ] || tags=("dynamo:latest-$name")
[ -z "$release" ] || tags+=("dynamo:$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/dynamo/__init__.py")-$name")
for tag in "${tags[@]}"; do args+=(--tag "$tag"); done
command=(docker build "${args[@]}" --file "$root/container/Dockerfile.${framework,,}" "$root")

if [ -n "$dry_run" ]; then
  echo "DRY RUN: COMMANDS PRINTED ONLY" >&2
  line=$(printf '%q ' "${command[@]}")
  echo "${line% }"
  exit 0
fi
type -P docker >/dev/null || fail "docker was not found; install it: https://docs.docker.com/engine/install" 127
export DOCKER_BUILDKIT=1 # the Dockerfiles use cache mounts for downloads
exec "${command[@]}"
