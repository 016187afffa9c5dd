#!/usr/bin/env bash
# run.sh: start a container from an image built by build.sh. `run.sh --help` lists the flags.
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "$0")")")

usage() {
  cat <<'HELP'
usage: container/run.sh [FLAG ...] [-- COMMAND [ARGUMENT ...]]

Without COMMAND: a shell with -it, else the image's default command (dynamo serve graphs.agg:Frontend ...).

  --framework NAME       VLLM (default; VLLM_V1 is the same), VLLM_NIXL or CPU; case-insensitive
  --target STAGE         use the image of this stage (build.sh --target)
  --image NAME           image name, default dynamo:latest-<framework>[-<target>]
  --name NAME            container name
  --gpus all|none|...    GPUs, as for docker run; default all, none with --framework cpu
  --runtime NAME         container runtime, such as nvidia; ignored without GPUs
  --use-nixl-gds         mounts and capabilities that NIXL needs for GPUDirect Storage
  -it                    interactive, attached to this terminal
  -v SOURCE:DIR          mount SOURCE at DIR; can be repeated
  -e NAME[=VALUE]        set a variable, or pass on this shell's; can be repeated. Passed on if they are set:
                         NATS_SERVER, ETCD_ENDPOINTS, HF_TOKEN, HF_HUB_OFFLINE, all DYN_..., NATS_AUTH_... and
                         ETCD_AUTH_..., and DYNAMO_KV_SECRET, _PORT, _SERVICE_NAME, _SERVE_DEPENDS, _SYSTEM_APP_...
  --host ADDRESS         address on which the graph listens: default $DYNAMO_HOST, else the configuration's, else all:
                         other machines reach the graph; set DYN_API_KEYS. 127.0.0.1: this host only
  --hf-cache DIR|NONE    directory for models; default $HF_HOME, else ~/.cache/huggingface. NONE: an anonymous volume
  --mount-workspace      mount this checkout at /workspace and use its sources instead of the image's; in a terminal, -it
  --workspace DIR        mount DIR at /workspace instead
  --workdir DIR          directory in which the command runs, default /workspace
  --user UID[:GID]       user in the container; default: yours, so that files it writes belong to you
  --entrypoint PROGRAM   replace the image's entrypoint
  --privileged [TRUE|FALSE]
  --rm [TRUE|FALSE]      remove the container when it ends, default TRUE
  --dry-run              print the docker command and exit
  -h, -?, --help         show this

The container uses the host's network: the graph is on port 8000 of this host; change it with dynamo serve's -p or --port.
--host takes precedence over `host` in the configuration file, as dynamo serve's --host does.

  ./container/run.sh --framework cpu
  ./container/run.sh --gpus all -it --framework vllm -v "$(pwd)/../config:/workspace/examples/llm/configs"
  ./container/run.sh -- dynamo serve graphs.agg:Frontend -f configs/agg_llama_nemotron_4b.yaml
HELP
}
fail() { printf 'error: %s\n' "$1" >&2; exit "${2:-1}"; }
misuse() { printf 'error: %s\n\n' "$1" >&2; usage >&2; exit 2; }

framework=VLLM target='' image='' name='' gpus='' interactive='' mounts=() variables=() hf_cache='' workspace=''
user="$(id -u):$(id -g)" entrypoint='' host="${DYNAMO_HOST:-}" own_host='' runtime='' workdir=/workspace
nixl_gds='' privileged=FALSE remove=TRUE dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --framework | --target | --image | --name | --gpus | -v | -e | --hf-cache | --workspace | --user | --entrypoint | \
      --host | --runtime | --workdir)
      { [ $# -ge 2 ] && [ -n "$2" ] && [[ $2 != -* ]]; } || misuse "$1 needs a value" ;;&
    --framework) framework=${2^^}; shift ;;
    --target) target=$2; shift ;;
    --image) image=$2; shift ;;
    --name) name=$2; shift ;;
    --gpus) gpus=$2; shift ;;
    -v) mounts+=(-v "$2"); shift ;;
    -e)
      variables+=(-e "$2")
      case $2 in DYNAMO_HOST | DYNAMO_HOST=*) own_host=yes ;; esac
      shift ;;
    --hf-cache) hf_cache=$2; shift ;;
    --workspace) workspace=$2; shift ;;
    --user) user=$2; shift ;;
    --entrypoint) entrypoint=$2; shift ;;
    --host) host=$2; shift ;;
    --runtime) runtime=$2; shift ;;
    --workdir) workdir=$2; shift ;;
    --use-nixl-gds) nixl_gds=yes ;;
    --mount-workspace)
      workspace=$root
      [ ! -t 0 ] || interactive=-it ;;
    -it) interactive=-it ;;
    --privileged | --rm)
      value=TRUE
      case ${2-} in [Tt][Rr][Uu][Ee] | [Ff][Aa][Ll][Ss][Ee]) value=${2^^} ;; esac
      if [ "$1" = --rm ]; then remove=$value; else privileged=$value; fi
      [ "${2-}" = "" ] || [ "${2^^}" != "$value" ] || shift ;;
    --dry-run) dry_run=yes ;;
    -h | -\? | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) misuse "unknown flag: $1" ;;
    *) misuse "$1 is not a flag; put the command after --" ;;
  esac
  shift
done

case $framework in
  VLLM | VLLM_NIXL | VLLM_V1) framework=VLLM; : "${gpus:=all}" ;;
  CPU) : "${gpus:=none}" ;;
  TENSORRTLLM | TRTLLM | SGLANG) misuse "--framework $framework: the engine here is vLLM; use VLLM or CPU" ;;
  STANDARD | NONE) misuse "--framework $framework: there is no image without an engine; CPU runs on any machine" ;;
  *) misuse "unknown framework: $framework; use VLLM, VLLM_NIXL or CPU" ;;
esac

args=(--network host --ipc host --shm-size=10G --ulimit memlock=-1 --ulimit stack=67108864 --ulimit nofile=65536:65536)
# a graph drains for up to 30 s; `docker stop` would kill it after 10
args+=(--cap-add CAP_SYS_PTRACE --stop-timeout 40 --user "$user" -w "$workdir")
if [ "${gpus,,}" != none ]; then
  args+=(--gpus "$gpus")
  [ -z "$runtime" ] || args+=(--runtime "$runtime")
fi
[ -z "$nixl_gds" ] || args+=(-v /run/udev:/run/udev:ro --cap-add IPC_LOCK)
[ -z "$interactive" ] || args+=(-it)
[ "$remove" = FALSE ] || args+=(--rm)
[ "$privileged" = FALSE ] || args+=(--privileged)
[ -z "$name" ] || args+=(--name "$name")
[ -z "$entrypoint" ] || args+=(--entrypoint "$entrypoint")
if [ -n "$workspace" ]; then
  workspace=$(realpath -m -- "$workspace")
  # PYTHONPATH: the sources there take precedence over those in the image
  args+=(-v "$workspace:/workspace" -e PYTHONPATH=/workspace)
fi
if [ "${hf_cache^^}" != NONE ]; then
  HOME=${HOME:-~} # not set by cron and systemd: then the one in /etc/passwd
  hf_cache=$(realpath -m -- "${hf_cache:-${HF_HOME:-$HOME/.cache/huggingface}}")
  args+=(-v "$hf_cache:/home/dynamo/.cache/huggingface")
fi
[ -z "$host" ] || [ -n "$own_host" ] || args+=(-e "DYNAMO_HOST=$host")
# by name only: secrets must appear neither in the output nor in the process list
for variable in NATS_SERVER ETCD_ENDPOINTS "${!NATS_AUTH_@}" "${!ETCD_AUTH_@}" HF_TOKEN HF_HUB_OFFLINE "${!DYN_@}" \
  DYNAMO_KV_SECRET DYNAMO_PORT DYNAMO_SERVICE_NAME DYNAMO_SERVE_DEPENDS "${!DYNAMO_SYSTEM_APP_@}"; do
  [ -z "${!variable:-}" ] || args+=(-e "$variable")
done
args+=(${mounts[@]+"${mounts[@]}"} ${variables[@]+"${variables[@]}"})
[ $# -gt 0 ] || [ -z "$interactive" ] || [ -n "$entrypoint" ] || set -- bash
command=(docker run "${args[@]}" "${image:-dynamo:latest-${framework,,}${target:+-$target}}" "$@")

if [ -n "$dry_run" ]; then
  echo "DRY RUN: COMMANDS PRINTED ONLY" >&2
  line=$(printf '%q ' "${command[@]}")
  echo "${line% }"
  exit 0
fi
type -P docker >/dev/null || fail "docker was not found; install it: https://docs.docker.com/engine/install" 127
[ -z "$workspace" ] || [ -d "$workspace" ] || fail "--workspace $workspace is not a directory"
# docker would create a missing directory as root
[ "${hf_cache^^}" = NONE ] || mkdir -p -- "$hf_cache" || fail "cannot create $hf_cache; choose a directory with --hf-cache"
exec "${command[@]}"
