#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command; each part has a time limit, and one that fails stops no other.
#
#   bash benchmarks/gpu.sh [--dry-run] [--quick] [--only PART,...] [--out DIR]
#
#   --dry-run  every path with tiny sizes on the CPU, into a temporary folder
#   --quick    the shapes that the goals name, and no others
#   --only     parts to run; "steps" and "compare" name all that begin so
#   --out      folder of the rows, logs and plot; benchmarks/results/gpu unless told
#
# Rows are appended to DIR/rows.jsonl as they are measured, so parts can be run in several calls and a part again.
# PYTHON names the interpreter: .venv/bin/python where there is one. COMMIT names the commit where there is no checkout.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run='' quick='' only='' out=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --quick) quick=--quick ;;
    --only) only=${2:?--only needs parts}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # an engine that is not installed is found all the same
export COMMIT PYTHONPATH PYTHONUNBUFFERED=1

tiny=''
if [ "$dry_run" ]; then
  tiny=--tiny
  out=${out:-$(mktemp -d)}
  export JAX_PLATFORMS=cpu
fi
out=${out:-benchmarks/results/gpu}
mkdir -p "$out"
log=$out/log.txt
names=() results=() seconds=() failed=0

wanted() { # name
  [ -z "$only" ] && return 0
  local part
  for part in ${only//,/ }; do
    case $1 in "$part" | "$part"-*) return 0 ;; esac
  done
  return 1
}

part() { # name, seconds, command...
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  wanted "$name" || return 0
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  names+=("$name") seconds+=($((SECONDS - begun)))
  case $status in
    0) results+=(ok) ;;
    124 | 137) results+=("out of time") failed=1 ;;
    *) results+=("failed ($status)") failed=1 ;;
  esac
}

bench() { # name, seconds, script, arguments...
  local name=$1 limit=$2 script=$3
  shift 3
  part "$name" "$limit" "$python" "benchmarks/$script" --out "$out" $tiny "$@"
}

# On a CPU the suites take minutes and are run elsewhere.
tests=(tests/pallas_kernels tests/engine/test_backends.py)
[ "$dry_run" ] && tests=(tests/pallas_kernels/test_tuning.py tests/pallas_kernels/test_dispatch.py)
part numerics 200 "$python" -m pytest -q -m 'kernels or not (aot or serving or browser or soak)' --maxfail=30 "${tests[@]}"
bench ceilings 50 ceilings.py
bench kernels 190 kernels.py $quick --budget 160
bench tune 150 kernels.py --tune $quick --budget "$([ "$dry_run" ] && echo 10 || echo 120)"
# Whoever asks for the rows elsewhere will want to take these along.
if [ -z "$dry_run" ] && [ "$out" != benchmarks/results/gpu ] && wanted tune; then
  cp pallas_kernels/tuned/*.json "$out"
fi

if [ "$quick" ]; then
  few=(--rows 64 --contexts 2048 --prefill 2048)
else
  few=()
fi
bench steps-8b 190 gpu_steps.py --model Llama-3-8B "${few[@]}"
# Its keys and values are large: at 64 rows of 2,048 tokens the card is full.
bench steps-13b 190 gpu_steps.py --model Llama-2-13B --option memory_utilization=0.95 "${few[@]}"
part steps-no-graphs 120 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" \
  "$python" benchmarks/gpu_steps.py --out "$out" $tiny --model Llama-3-8B --label 'no command buffers' \
  --rows 1 8 64 --contexts 2048 --prefill

bench compare-jaxserve 360 comparison.py --engine jaxserve
bench compare-transformers 210 comparison.py --engine transformers --seconds 40

only='' # what there is by now is always told
part report 60 "$python" benchmarks/report.py --gpu "$out"

printf '\n%-22s %8s  %s\n' part seconds result
for i in "${!names[@]}"; do printf '%-22s %8s  %s\n' "${names[i]}" "${seconds[i]}" "${results[i]}"; done
echo "rows, log and plot: $out"
exit $failed
