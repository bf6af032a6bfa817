#!/bin/bash
# Everything a machine with CUDA can tell, in at most nine minutes: benchmarks/gpu.sh FOLDER
# Works without installing. A part that fails, or runs out of its time, does not stop the rest; the exit status is how many did.
# Needs pytest-xdist. Liger-Kernel stands in the kernel table where it can be imported:
# pip install --no-deps --target DIR liger-kernel; PYTHONPATH=DIR
# SMOKE=1 tries the script itself with tiny sizes, on any machine.
folder=$(mkdir -p "${1:?usage: benchmarks/gpu.sh FOLDER}" && cd "$1" && pwd) || exit
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=.:kernels:$PYTHONPATH PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=expandable_segments:True # two sides of different shapes share the GPU's memory
failed=0

part() { # part NAME SECONDS COMMAND...: its output in FOLDER/NAME.txt, and the last lines of it here
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    [ -z "$SMOKE" ] || seconds=600 # the limits below are a GPU's
    timeout -k 5 "$seconds" "$@" >"$folder/$name.txt" 2>&1
    local status=$?
    tail -n 3 "$folder/$name.txt"
    echo "$name: exit status $status after $((SECONDS - start)) s"
    [ $status = 0 ] || failed=$((failed + 1))
}

if [ -z "$SMOKE" ]; then
    python -c 'import torch; assert torch.cuda.is_available()' || { echo "no CUDA: SMOKE=1 tries the script without"; exit 1; }
    shape="--shape 7b" full="--tokens 8192" short=$full recompute=
    decode="--batch 1,8,32 --prompt-tokens 512 --new-tokens 32 --first-token 128,512,2048" kernels="--seconds 105"
else
    shape="--shape 7b --layers 1" full="--tokens 1024 --steps 1" short="--tokens 256 --steps 1" recompute="--tokens 1024 --steps 1"
    decode="--batch 1,2 --prompt-tokens 16 --new-tokens 8 --first-token 8" kernels=--smoke
fi
part device 30 python -m benchmarks.device --output "$folder"
# first, for most of its time goes into compiling, side by side, what the parts below find in Triton's cache
part tests 110 python -m pytest -m cuda -q -rfE -p no:cacheprovider -n "$(nproc)" --dist worksteal \
    $(grep -rl --include="*.py" mark.cuda tests)
part kernels 125 python -m benchmarks.kernels $kernels --output "$folder"
part train-full 80 python -m benchmarks.train_step $shape $full --rows full --output "$folder"
part train-short 65 python -m benchmarks.train_step $shape $short --rows short --output "$folder"
part recompute 30 python -m benchmarks.recompute $shape $recompute --output "$folder"
part decode 75 python -m benchmarks.decode $shape $decode --output "$folder"
timeout 10 python -m benchmarks.table "$folder"
[ ! -f "$folder/kernels.json" ] || timeout 15 python -m benchmarks.plot "$folder"
exit $failed
