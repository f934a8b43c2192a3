#!/usr/bin/env bash
# Checks and measures tokenprune on a GPU. See README.md in this folder.
#
#   research/gpu/run.sh [OUT] [options of `tokenprune bench run`]
#
# Environment: DEVICE (cuda), MODEL (llava-v1.6-vicuna-7b), SIZE (672x672), BATCHES ("1 8"), COMPILED_BATCHES ("1 8"),
# PROFILE_BATCHES ("1"), STEPS ("tests checks table compiled profile"), PYTHON (python).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:-gpu-results}
shift || true
device=${DEVICE:-cuda} model=${MODEL:-llava-v1.6-vicuna-7b} size=${SIZE:-672x672} python=${PYTHON:-python}
read -r -a batches <<<"${BATCHES:-1 8}"
read -r -a compiled_batches <<<"${COMPILED_BATCHES:-1 8}"
read -r -a profile_batches <<<"${PROFILE_BATCHES:-1}"
steps=" ${STEPS:-tests checks table compiled profile} "
export HF_HUB_OFFLINE=1
mkdir -p "$out"
failed=0

# Usage: step NAME SECONDS COMMAND... ; writes NAME.txt, and adds exit code and duration to steps.txt. A step whose name
# without the part after "-" is not in STEPS is skipped.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    [[ $steps == *" ${name%%-*} "* ]] || return 0
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
for batch in "${compiled_batches[@]}"; do # a process for each batch, so that a time limit loses one batch only
    step "compiled-$batch" 600 "$python" -m tokenprune bench run --config research/gpu/llava_next_7b.yaml \
        --device "$device" --model "$model" --sizes "$size" --batches "$batch" --dtype auto \
        --budget 0.2 0.0556 --compile true --out "$out/bench-compiled-$batch" "$@"
done
step profile 240 "$python" -m research.gpu.profile_calls \
    --device "$device" --model "$model" --size "$size" --batches "${profile_batches[@]}" --compile true \
    --out "$out/profile"
exit "$failed"
