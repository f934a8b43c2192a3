#!/usr/bin/env bash
# Checks and measures tokenprune on a GPU. See README.md in this folder.
#
#   research/gpu/run.sh [OUT] [options of `tokenprune bench run`]
#
# Environment: DEVICE (cuda), MODEL (llava-v1.6-vicuna-7b), SIZE (672x672), BATCHES ("1 8"), PYTHON (python),
# COMPILED_BATCHES ("1").
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:-gpu-results}
shift || true
device=${DEVICE:-cuda} model=${MODEL:-llava-v1.6-vicuna-7b} size=${SIZE:-672x672} python=${PYTHON:-python}
read -r -a batches <<<"${BATCHES:-1 8}"
read -r -a compiled_batches <<<"${COMPILED_BATCHES:-1}"
export HF_HUB_OFFLINE=1
mkdir -p "$out"
: >"$out/steps.txt"
failed=0

# Usage: step NAME SECONDS COMMAND... ; writes NAME.txt, and adds exit code and duration to steps.txt.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt" || code=$?
    echo "$name: exit code $code, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
    [ "$code" -eq 0 ] || failed=1
}

mapfile -t gpu_tests < <(grep -rl "pytest.mark.gpu" tests --include="test_*.py" | sort)
step tests 120 "$python" -m pytest -m gpu -p no:cacheprovider "${gpu_tests[@]}"
step checks 120 "$python" -m research.gpu.checks \
    --device "$device" --model "$model" --size "$size" --out "$out/checks.json"
step table 240 "$python" -m tokenprune bench run --config research/gpu/llava_next_7b.yaml \
    --device "$device" --model "$model" --sizes "$size" --batches "${batches[@]}" --dtype auto --out "$out/bench" "$@"
step compiled 600 "$python" -m tokenprune bench run --config research/gpu/llava_next_7b.yaml \
    --device "$device" --model "$model" --sizes "$size" --batches "${compiled_batches[@]}" --dtype auto \
    --budget 0.2 0.0556 --compile true --out "$out/bench-compiled" "$@"
step profile 240 "$python" -m research.gpu.profile_calls \
    --device "$device" --model "$model" --size "$size" --batches "${compiled_batches[@]}" --compile true \
    --out "$out/profile"
exit "$failed"
