#!/bin/bash
# Runs all tests and benchmarks that need a GPU, in at most nine minutes: benchmarks/gpu.sh FOLDER
# Needs no installation. A part that fails or exceeds its time does not stop the others; the exit status is the number
# of failed parts. The kernel table includes Liger-Kernel if it can be imported:
# pip install --no-deps --target DIR liger-kernel; PYTHONPATH=DIR
# SMOKE=1 tests the script itself with tiny sizes, on any machine.
folder=$(mkdir -p "${1:?usage: benchmarks/gpu.sh FOLDER}" && cd "$1" && pwd) || exit
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=.:kernels:$PYTHONPATH PYTHONUNBUFFERED=1
# two sides of different shapes share the GPU's memory
export PYTORCH_ALLOC_CONF=expandable_segments:True
failed=0

# part NAME SECONDS COMMAND...: writes the output to FOLDER/NAME.txt, and prints its last lines
part() {
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    # the limits below are for a GPU
    [ -z "$SMOKE" ] || seconds=600
    timeout -k 5 "$seconds" "$@" >"$folder/$name.txt" 2>&1
    local status=$?
    tail -n 3 "$folder/$name.txt"
    echo "$name: exit status $status after $((SECONDS - start)) s"
    [ $status = 0 ] || failed=$((failed + 1))
}

if [ -z "$SMOKE" ]; then
    python -c 'import torch; assert torch.cuda.is_available()' || { echo "CUDA is not available; SMOKE=1 tests the script without it"; exit 1; }
    shape="--shape 7b" full="--tokens 8192" short=$full
    decode="--batch 1,8,32 --prompt-tokens 512 --new-tokens 32 --first-token 128,512,2048" kernels="--seconds 105"
else
    shape="--shape 7b --layers 1" full="--tokens 1024 --steps 1" short="--tokens 256 --steps 1"
    decode="--batch 1,2 --prompt-tokens 16 --new-tokens 8 --first-token 8" kernels=--smoke
fi
part device 35 python -m benchmarks.device --output "$folder"
# one process per file, because compiling takes most of the time
part tests 95 sh -c 'grep -rl --include="*.py" mark.cuda tests | xargs -n 1 -P 8 python -m pytest -m cuda -q -rfE -p no:cacheprovider'
part kernels 140 python -m benchmarks.kernels $kernels --output "$folder"
part train-full 90 python -m benchmarks.train_step $shape $full --rows full --output "$folder"
part train-short 80 python -m benchmarks.train_step $shape $short --rows short --output "$folder"
part decode 75 python -m benchmarks.decode $shape $decode --output "$folder"
timeout 10 python -m benchmarks.table "$folder"
[ ! -f "$folder/kernels.json" ] || timeout 15 python -m benchmarks.plot "$folder"
exit $failed
