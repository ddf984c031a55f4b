#!/usr/bin/env bash
# All that a GPU has to show, in ten minutes:  results/gpu_check.sh [FOLDER]
#
# It runs tests/test_cuda.py, and those tables of benchmark.py that need no plain version. Output goes to the terminal
# and to FOLDER (by default results/gpu/NAME_DATE, with the GPU's name). A step that fails or takes too long does not
# stop the others; it is named at the end, and the exit code is 1. Variables:
#   PYTHON             the interpreter, python by default; it needs requirements.txt and tests/requirements.txt
#   GPU_CHECK_SECONDS  for all steps together, 600 by default
#   IRIS_TEST_DEVICE   cpu tries the script itself in small sizes where there is no GPU; cuda by default
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
device=${IRIS_TEST_DEVICE:-cuda}
total=${GPU_CHECK_SECONDS:-600}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -cs 'A-Za-z0-9\n' '-')
folder=${1:-$PWD/results/gpu/${name:-$device}_$(date +%Y-%m-%d_%H%M)}
[[ $folder == /* ]] || folder=$here/$folder
mkdir -p "$folder" || exit 1
export IRIS_TEST_DEVICE=$device PYTHONUNBUFFERED=1
failed=()

step() {  # NAME SECONDS COMMAND...: runs it for this long at most (if all have 600), and writes NAME.txt
    local name=$1 limit=$(($2 * total / 600)) left=$((total - SECONDS - 5)) status
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 1)); then
        failed+=("$name (no time was left)")
        return
    fi
    echo "== $name, $limit s at most"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.txt"
    status=${PIPESTATUS[0]}
    case $status in
        0) ;;
        124 | 137) failed+=("$name (stopped after $limit s)") ;;
        *) failed+=("$name (exit code $status)") ;;
    esac
}

describe='
import os, sys, torch
print("Python", sys.version.split()[0], " torch", torch.__version__, " CUDA", torch.version.cuda)
print("cores", os.cpu_count(), " threads", torch.get_num_threads())
if sys.argv[1] == "cuda":
    assert torch.cuda.is_available(), "torch finds no GPU"
    properties = torch.cuda.get_device_properties(0)
    print(properties, " cuDNN", torch.backends.cudnn.version(), " bf16", torch.cuda.is_bf16_supported(False))
'
benchmark=("$python" results/benchmark.py --device "$device")
if [[ $device == cpu ]]; then
    benchmark+=(--preset catch --updates 1 --seconds 1)
fi

(
    date
    git rev-parse HEAD
    nvidia-smi
) >"$folder/machine.txt" 2>&1
step torch 60 "$python" -c "$describe" "$device"
step tests 270 "$python" -m pytest tests/test_cuda.py -v -rs --durations 10
step phases 220 "${benchmark[@]}" --tables phases --json "$folder/phases.json"
step sharing 600 "${benchmark[@]}" --tables sharing --json "$folder/sharing.json"

echo "== $SECONDS s; everything printed above is in $folder"
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" | tee "$folder/failed.txt"
    exit 1
fi
