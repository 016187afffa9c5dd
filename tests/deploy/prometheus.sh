#!/usr/bin/env bash
# prometheus.sh DIRECTORY: the directory with `prometheus` and `promtool`, on standard output. Those on PATH; else those of
# Debian's or Ubuntu's package, unpacked once into DIRECTORY: nothing is installed, and root is not required.
# Exit 3, with the reason on standard error, where there is neither.
set -euo pipefail
cache=$(realpath -m "$1")

missing() { printf '%s\n' "$1" >&2; exit 3; }

if found=$(command -v prometheus) && command -v promtool >/dev/null; then
  dirname "$found"
  exit
fi
if [ -x "$cache/usr/bin/prometheus" ]; then
  echo "$cache/usr/bin"
  exit
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
  missing "no prometheus on PATH, and no apt-get and dpkg to get Debian's package with"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
quiet=(-qq -o Acquire::Retries=2 -o Acquire::http::Timeout=20)
if ! apt-get "${quiet[@]}" download prometheus 2>log; then
  # The machine's package lists are missing or old, and may not be ours to write: lists of our own.
  mkdir -p lists/partial cache/archives/partial
  own=("${quiet[@]}" -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache")
  if [ "$(id -u)" = 0 ]; then
    own+=(-o APT::Sandbox::User=root) # else apt gives up root for a user who cannot write here
  fi
  if ! { apt-get "${own[@]}" update && apt-get "${own[@]}" download prometheus; } 2>log; then
    missing "no prometheus on PATH, and Debian's package cannot be downloaded: $(grep -m 1 '^[EW]:' log)"
  fi
fi
dpkg -x prometheus_*.deb unpacked || missing "Debian's package of prometheus cannot be unpacked"
unpacked/usr/bin/prometheus --version >/dev/null 2>log || missing "Debian's prometheus does not run here: $(tail -n 1 log)"
mkdir -p "$(dirname "$cache")"
mv -T unpacked "$cache" 2>/dev/null || [ -x "$cache/usr/bin/prometheus" ] # another run was first
echo "$cache/usr/bin"
