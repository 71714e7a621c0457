#!/usr/bin/env bash
# Everything that issue 7 wants from a machine with a GPU, in parts that take less than 10 minutes each.
#
#   benchmarks/gpu_day.sh OUTPUT PART...              OUTPUT: a folder; parts in the order given
#   benchmarks/gpu_day.sh --dry-run OUTPUT all        prints the commands
#   DEVICE=cpu benchmarks/gpu_day.sh OUTPUT muon      the same line small, on a CPU: that it runs, not how fast
#
# Parts (minutes on one H100, estimated, as none has run yet):
#   check        what is installed, what is missing, which GPU          (1)
#   tests        pytest kernels/tests tests/test_engine.py -m gpu       (5)
#   kernels      build for this GPU, then kernels/benchmarks            (4)
#   latency-448  benchmarks/latency.py at 3 x 448, all arms             (8)
#   latency-224  benchmarks/latency.py at 3 x 224, all arms             (8)
#   muon         benchmarks/muon.py --speed at full width               (3)
#   all          all of them: half an hour
# So, with 10 minutes a command and 30 in all: "check kernels muon", "tests", "latency-448", "latency-224".
#
# Nothing has to be installed but the interpreter's packages; the checkout is found through a link. On an image with torch
# 2.11 (CUDA 13), triton 3.6 and transformers 5.17 carry these wheels in WHEELS (default: wheels/), which `check` installs
# without dependencies: transformers 5.22.2, huggingface_hub 2.4.0, httpx2, httpcore2, truststore. lerobot, trl, kernels and
# gradio are not needed. `kernels` needs nvcc; the latency parts take its build through LOCAL_KERNELS if the package
# `kernels` is there, and leave the arm graph+kernels out otherwise.
#
# Each part writes OUTPUT/<part>.log and its results beside it; a part that fails does not keep the next from running, and
# the script then ends with 1.
set -uo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then
  dry_run=true
  shift
fi
if [ $# -lt 2 ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
output=$(cd "$1" && pwd)
shift
device=${DEVICE:-cuda}
wheels=${WHEELS:-$root/wheels}
python=${PYTHON:-python3}
commit=${COMMIT:-$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)}

# The package is the checkout itself, under its name
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root" "$links/wallvla"
export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export LOCAL_KERNELS="x-square/wallvla-kernels=$root/kernels"
cd "$root" || exit 1

run() {
  echo "+ $*"
  $dry_run || "$@"
}

check() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    run "$python" -m pip install --no-index --no-deps "$wheels"/*.whl || return
  fi
  run "$python" - <<'PYTHON'
import importlib.metadata
import importlib.util

import torch

for name in ("torch", "triton", "transformers", "huggingface_hub", "kernels", "peft", "accelerate", "pytest", "hypothesis"):
    found = importlib.util.find_spec(name)
    print(f"{name:<16} {importlib.metadata.version(name) if found else 'MISSING'}")
print("GPU             ", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
import wallvla.inference  # noqa: E402, F401

print("wallvla          imports")
PYTHON
}

tests() {
  run "$python" -m pytest kernels/tests tests/test_engine.py -m gpu -q -rs -o addopts= --junitxml "$output/tests.xml"
}

build_and_benchmark() {
  if [ "$device" = cpu ]; then
    run "$python" kernels/build_without_nix.py cpu &&
      run "$python" kernels/benchmarks/benchmark.py --device cpu --calls 2 --output "$output/kernels.md"
    return
  fi
  local arch=9.0
  $dry_run || arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return
  run "$python" kernels/build_without_nix.py cuda --archs "$arch" &&
    run "$python" kernels/benchmarks/benchmark.py --device cuda --output "$output/kernels.md"
}

latency() {
  local options=(--image-sizes "$1" --commit "$commit" --output "$output/latency-$1")
  if [ "$device" = cpu ]; then
    options+=(--calls 2 --warm-up 1 --seconds 5)
  fi
  run "$python" benchmarks/latency.py --device "$device" --trust-kernels "${options[@]}"
}

muon() {
  local divide=1
  [ "$device" = cpu ] && divide=32
  run "$python" benchmarks/muon.py --speed --device "$device" --divide "$divide" --output "$output/muon"
}

part() {
  case $1 in
    check) check ;;
    tests) tests ;;
    kernels) build_and_benchmark ;;
    latency-448) latency 448 ;;
    latency-224) latency 224 ;;
    muon) muon ;;
    *)
      echo "Found part $1. Known: check, tests, kernels, latency-448, latency-224, muon, all."
      return 2
      ;;
  esac
}

failed=()
[ "$*" = all ] && set -- check tests kernels latency-448 latency-224 muon
for name in "$@"; do
  started=$SECONDS
  echo "== $name, commit $commit, $(date -u +%FT%TZ)"
  part "$name" 2>&1 | tee "$output/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed+=("$name")
  echo "== $name: status $status, $((SECONDS - started)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "Failed: ${failed[*]}"
  exit 1
fi
