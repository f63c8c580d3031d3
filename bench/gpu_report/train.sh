#!/usr/bin/env bash
# Distil on a machine with a GPU and without a network: bash bench/gpu_report/train.sh FILES OUT [MINUTES]
#
# FILES holds smollm2.gguf.00 and .01 with smollm2.gguf.sha256, train*.tok, heldout-*.tok, and gguf's wheel if the
# machine lacks that package. OUT receives the log and, every minute, the adapter in pieces.
set -euo pipefail
files=$(realpath "$1") out=$(realpath "$2") minutes=${3:-6.5}
cd "$(dirname "$0")/../.."
export PYTHONPATH="$files/site:.:python" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if compgen -G "$files/gguf-*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --upgrade --target "$files/site" "$files"/gguf-*.whl
fi
REFRAG_KERNELS_CUDA=0 python3 setup.py -q build_ext --inplace > "$files/build.log" 2>&1 &
build=$!
if [ ! -e "$files/decoder/config.json" ]; then
    cat "$files"/smollm2.gguf.0? > "$files/smollm2.gguf"
    (cd "$files" && sha256sum -c smollm2.gguf.sha256)
    python3 -c "import sys; from pathlib import Path; from refrag.weights import convert_gguf
convert_gguf(Path(sys.argv[1]) / 'smollm2.gguf', Path(sys.argv[1]) / 'decoder')" "$files" 2> "$files/convert.log" \
        || { tail -5 "$files/convert.log"; exit 1; }
fi
# Without the planner, the run falls back to torch's attention.
wait $build || tail -20 "$files/build.log"
echo "ready after $SECONDS s"

began=$SECONDS
distil() {
    python3 -m refrag.training.distill --tokens "$files"/train*.tok --heldout "$files"/heldout-*.tok \
        --decoder "$files/decoder" --output "$files/run" --pieces "$out" "$@"
}
# A failed kernel makes the GPU unusable for the process. A new process resumes from the last minute without that kernel.
distil --minutes "$minutes" "${@:4}" || {
    left=$(python3 -c "print(round($minutes - ($SECONDS - $began) / 60, 2))")
    echo "failed; $left minutes are left"
    distil --minutes "$left" --attention torch "${@:4}"
}
