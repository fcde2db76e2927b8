#!/usr/bin/env bash
# Everything that waits for a GPU, in one call: build, tests, block sizes, benchmarks, the most important first.
#
#   benchmarks/gpu.sh [--minutes 60] [--out DIR] [--wheels DIR] [--fastdp PATH] [--dry] [--list]
#
# Needs $PYTHON (or python3): 3.10 or later with torch >= 2.11 for CUDA and Triton >= 3.6; nvcc for the CUDA module.
# Missing packages come from --wheels, or from the index where there is none. DIR gets steps.jsonl (one line a step:
# name, status, seconds, file, why), a log of each step, the records, and tables.md. Every step has a limit, its part of
# the time or what is left; one that fails stops no other, and the exit status says whether any did. Without a GPU, or
# with --dry, the steps that apply run in short forms on the CPU: that they work is all they say.
set -u -o pipefail

minutes=60 out=gpu-results wheels="" fastdp="" dry=0 list=0
while (($#)); do
  case $1 in
    --minutes) minutes=$2 && shift ;;
    --out) out=$2 && shift ;;
    --wheels) wheels=$(realpath "$2") && shift ;;
    --fastdp) fastdp=$(realpath "$2") && shift ;;
    --dry) dry=1 ;;
    --list) list=1 ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
  esac
  shift
done
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2 && exit 2; }
[[ $python == /* ]] || python=$PWD/$python
((list)) || { mkdir -p "$out" && out=$(realpath "$out"); }
cd "$(dirname "$0")/.." || exit 2
budget=$(awk -v m="$minutes" 'BEGIN { printf "%d", 60 * m }')
has_gpu=0
((dry || list)) || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && has_gpu=1
((list)) && has_gpu=1
((has_gpu)) || dry=1
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((dry ? 1 : cores < 8 ? cores : 8))} PYTHONUNBUFFERED=1
PATH=$PATH:/usr/local/cuda/bin
failed=0

note() { # name status seconds file why
  ((list)) && return
  "$python" -c 'import json, sys
keys = ("step", "status", "seconds", "file", "why")
print(json.dumps({k: int(v) if k == "seconds" else v for k, v in zip(keys, sys.argv[1:]) if v}))' \
    "$@" | tee -a "$out/steps.jsonl"
}

skip() { if ((list)); then echo "$1: skipped, $2"; else note "$1" skipped 0 "" "$2"; fi; }

step() { # name percent command...: runs it for that part of the time at most, or for what is left
  local name=$1 limit=$((budget * $2 / 100)) left=$((budget - SECONDS)) start=$SECONDS code why=""
  shift 2
  if ((list)); then echo "$name: $*" && return; fi
  ((limit < left)) || limit=$left
  if ((limit < 10)); then skip "$name" "no time left" && return 1; fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null # pytest then says what it has found
  code=$?
  if ((code == 0)); then
    note "$name" ok $((SECONDS - start)) "$name.log" "$why"
  elif ((code == 124 || code == 137)); then
    failed=1 && note "$name" "timed out" $((SECONDS - start)) "$name.log" "after $limit s"
  else
    failed=1 && note "$name" failed $((SECONDS - start)) "$name.log" "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-300)"
  fi
  return "$code"
}

tests() { # name percent tests...
  local name=$1 percent=$2 workers=$((cores / 2 < 8 ? cores / 2 : 8))
  shift 2
  local parallel=()
  if ((!dry && !list && workers > 1)) && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$workers"); fi
  step "$name" "$percent" env OMP_NUM_THREADS=1 "$python" -m pytest -q -rfE -p no:cacheprovider "${parallel[@]}" "$@"
}

environment() {
  "$python" - <<'END'
import shutil, subprocess, sys
import torch
print(sys.version)
print("torch", torch.__version__, "cuda", torch.version.cuda)
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print(error)
for tool in ("nvidia-smi", "nvcc", "compute-sanitizer"):
    print(tool, shutil.which(tool))
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.device_count(), "of them")
    subprocess.run(["nvidia-smi"])
END
}

packages() { # what is not there yet, by the names of module and package
  local missing=() pair source=()
  for pair in "opacus:opacus>=1.6,<1.7" opt_einsum:opt-einsum scipy:scipy pybind11:pybind11 ninja:ninja wheel:wheel pytest:pytest \
    hypothesis:hypothesis numpy:numpy matplotlib:matplotlib; do
    "$python" -c "import ${pair%%:*}" 2>/dev/null || missing+=("${pair##*:}")
  done
  "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null ||
    missing+=("setuptools>=77,<82")
  echo "missing: ${missing[*]:-nothing}"
  ((${#missing[@]})) || return 0
  [[ -z $wheels ]] || source=(--no-index --find-links "$wheels")
  "$python" -m pip install --disable-pip-version-check --no-deps "${source[@]}" "${missing[@]}"
}

build() { # 1 with the CUDA module, 0 without
  local archs
  archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  DP2VAE_FAST_NATIVE=1 DP2VAE_FAST_CUDA=$1 DP2VAE_FAST_CUDA_ARCHS=$archs \
    "$python" -m pip install -v --disable-pip-version-check --no-build-isolation --no-deps -e .
}

part() { # minutes that so many percent of the time are, less what is over already
  awk -v b="$budget" -v p="$1" -v s="$SECONDS" 'BEGIN { t = b * p / 100; r = b - s; print (t < r ? t : r) / 60 }'
}

export -f environment packages build
export python wheels

rival=(--fastdp "$fastdp")
quick=(--rounds 15 --patience 0 --limit 120)
small="(words or factors or clipped_sum and classifier and ieee and not channels)"
main_variants=(non-private non-private-graph ours ours-captured non-private-bf16 ours-bf16 opacus-ghost opacus-hooks)

((list)) || : >"$out/steps.jsonl"
step environment 10 bash -c environment
if ((dry)); then
  skip build "no GPU"
  tests tests 40 tests/test_cuda.py -k "clipped_sum or seeded or words or factors"
  skip tests-triton "no GPU: continuous integration interprets them"
  skip sanitizer "no GPU"
  step step 30 "$python" benchmarks/bench_step.py --workloads W1-decoder@8 --rounds 2 --patience 0 --threads 1 \
    --malloc default --variants non-private ours ours-bf16 --again --out "$out/step_cpu.json"
  step ops 30 "$python" benchmarks/bench_gpu_ops.py --dry
  step tune 30 "$python" benchmarks/tune.py --dry
  skip step-all "no GPU"
  skip capacity "no GPU"
else
  step packages 20 bash -c packages
  if ((!list)) && ! command -v nvcc >/dev/null; then
    skip build "nvcc is not there"
    step build-without-cuda 30 bash -c "build 0"
  else
    step build 40 bash -c "build 1" || ((list)) || step build-without-cuda 30 bash -c "build 0"
  fi
  tests tests 30 tests/test_cuda.py tests/test_captured.py
  tests tests-triton 25 tests/test_triton.py tests/test_triton_noise.py tests/test_triton_norm.py \
    tests/test_triton_weighted.py tests/test_triton_engine.py
  step step 25 "$python" benchmarks/bench_step.py --device cuda "${quick[@]}" "${rival[@]}" --again \
    --minutes "$(part 18)" --workloads W2-decoder@512 W4-decoder@256 W1-decoder@2048 W3-decoder@4096 \
    --variants "${main_variants[@]}" --out "$out/step_main_cuda.json"
  step ops 12 "$python" benchmarks/bench_gpu_ops.py --minutes "$(part 9)" --out "$out/ops_cuda.json"
  if step tune 15 "$python" benchmarks/tune.py --minutes "$(part 12)" --copy "$out"; then
    step ops-tuned 12 "$python" benchmarks/bench_gpu_ops.py --minutes "$(part 9)" --out "$out/ops_tuned_cuda.json"
  else
    skip ops-tuned "tune did not get through"
  fi
  if ((list)) || command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      step "sanitizer-$tool" 15 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x \
        -p no:cacheprovider tests/test_cuda.py -k "$small and not cpu and not reference"
    done
  else
    skip sanitizer "compute-sanitizer is not there"
  fi
  step step-all 60 "$python" benchmarks/bench_step.py --device cuda "${quick[@]}" "${rival[@]}" --again \
    --minutes "$(part 45)" --out "$out/step_cuda.json"
  step capacity 100 "$python" benchmarks/bench_scaling.py --device cuda --parts capacity --cap 16 "${rival[@]}" \
    --workloads W2-decoder W4-decoder --variants non-private ours opacus-ghost opacus-hooks --patience 0 --again \
    --out "$out/scaling_cuda.json"
fi
if ((!list)); then
  "$python" benchmarks/report.py --from "$out" >"$out/tables.md"
  (($? == 0)) || { failed=1 && note tables failed 0 tables.md "report.py failed"; }
fi
exit "$failed"
