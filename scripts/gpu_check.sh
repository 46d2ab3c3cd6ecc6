#!/usr/bin/env bash
# One run on a machine with a GPU: builds here, checks every placement, then measures; in under 8 minutes, the most
# valuable first. Nothing is downloaded. Every step has a limit of its own, its output goes to $OUT/log.txt as it comes,
# its results to $OUT as soon as they are there, and one line about it to $OUT/summary.txt; a step that fails does not
# keep the next from running.
#
#   OUT=results scripts/gpu_check.sh                      # a machine on which the package is installed (make setup)
#   OUT=results PYTHON=python3 WHEELS=build/wheels scripts/gpu_check.sh --build    # a bare one, see `make gpu-wheels`
#   OUT=results scripts/gpu_check.sh --dry-run            # all steps, tiny, on a simulated device: two minutes
set -uo pipefail
cd "$(dirname "$0")/.."
dry='' build=''
for word in "$@"; do
  case $word in
    --dry-run) dry=1 ;;
    --build) build=1 ;;
    *) echo "gpu_check.sh: $word is not an option; allowed: --dry-run, --build" >&2; exit 2 ;;
  esac
done
if [ -z "${OUT:-}" ]; then echo 'gpu_check.sh: OUT is not set; give the folder for the results' >&2; exit 2; fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONUNBUFFERED=1
END=${dry:+900}
END=${END:-465} # seconds
failed=0
: >"$OUT/log.txt"
: >"$OUT/summary.txt"

# step NAME SECONDS COMMAND ...: in as much time as that, and as is left of it all.
step() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  [ -z "$dry" ] || limit=$((4 * limit)) # what it takes here says nothing
  if [ $((END - SECONDS)) -lt "$limit" ]; then limit=$((END - SECONDS)); fi
  if [ "$limit" -lt 10 ]; then
    failed=1
    echo "$name: left out, the time is over" | tee -a "$OUT/summary.txt" "$OUT/log.txt"
    return
  fi
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$OUT/log.txt"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed=1
  printf '%s: exit code %s after %s s\n' "$name" "$code" "$((SECONDS - begin))" | tee -a "$OUT/summary.txt" "$OUT/log.txt"
}

magicpig() { step "$1" "$2" "$PYTHON" -m magicpig "${@:3}"; }

if [ -n "$build" ]; then
  # Into a folder of its own, in front of what the machine has; the kernels are compiled for its processor.
  site=$(mktemp -d)
  wheels=(--no-index --no-deps --no-compile --quiet --target "$site")
  step wheels 60 "$PYTHON" -m pip install "${wheels[@]}" "${WHEELS:?gives the folder of make gpu-wheels}"/*.whl
  export PYTHONPATH=$site
  step build 150 "$PYTHON" -m pip install "${wheels[@]}" --upgrade --no-build-isolation .
fi

if [ -n "$dry" ]; then
  device=simulated
  export TRITON_INTERPRET=1
  tests=(tests/kernels/test_triton.py tests/placement/test_simulated.py -k 'merged or 1-16-1 or cuda or poisoned or Turns')
  small=(--heads 2 --kv-heads 1 --head-dim 16 --budget 10 --repeats 1)
  context=320 batches=1,2 long=()
  answers=(-k 'host')
  model=(--shape tiny --dtype float32 --context 150 --batch 2 --vram-limit 1 --budget 10 --steps 1 --repeats 1)
else
  device=cuda
  tests=(tests/kernels/test_triton.py tests/placement)
  small=()
  context=96K batches=1,2,4 long=(512K 1M)
  answers=()
  model=(--shape llama-3.1-8b --context 98304 --batch 1,2,4,8 --vram-limit 24 --steps 6 --repeats 1)
fi

step machine 20 "$PYTHON" -c 'import torch, triton, sys
print(sys.version.split()[0], torch.__version__, triton.__version__)
cuda = torch.cuda.is_available()
print(torch.cuda.get_device_name() if cuda else "no GPU", torch.cuda.mem_get_info() if cuda else "")'
magicpig doctor 30 doctor
step correctness 120 "$PYTHON" -m pytest -q -x -n 0 -p no:cacheprovider "${tests[@]}"
step answers 60 "$PYTHON" -m pytest -q -x -n 0 -p no:cacheprovider tests/engine/test_pocket_device.py \
  "${answers[@]}"
magicpig decode 170 bench decode --device "$device" "${model[@]}" --samplers full,sketch --json "$OUT/decode.json"
magicpig placements 120 bench placements --device "$device" --context "$context" --batch 1 "${small[@]}" \
  --json "$OUT/placements.json"
magicpig batches 100 bench placements --device "$device" --context "$context" --batch "$batches" "${small[@]}" \
  --json "$OUT/batches.json"
for tokens in ${long[@]+"${long[@]}"}; do
  magicpig "long-$tokens" 60 bench placements --device "$device" --context "$tokens" --batch 1 --repeats 5 \
    --json "$OUT/long-$tokens.json"
done
if [ -z "$dry" ] && command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --error-exitcode 3 "$PYTHON" -m pytest -q -x -n 0 -p no:cacheprovider \
    tests/kernels/test_triton.py -k 'merged or 17-33-80'
fi
# What the schedule says of this size, to be held beside what was measured.
"$PYTHON" -c 'import sys
from transformers import AutoConfig
from magicpig.studies.bench.shapes import settings
AutoConfig.for_model(**settings("llama-3.1-8b")).save_pretrained(sys.argv[1])' "$OUT/model" 2>>"$OUT/log.txt" || failed=1
magicpig plan 60 plan --model "$OUT/model" --context 98304 --batch 4 --vram 24
rm -rf "$OUT/model"
[ -z "$build" ] || rm -rf "$site"
echo && cat "$OUT/summary.txt"
exit "$failed"
