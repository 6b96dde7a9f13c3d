#!/bin/bash
# One node: torchrun.sh CONFIG OUTPUT_DIR [key=value ...]. Started again, it goes on from the newest checkpoint.
# torchrun kills its processes 30 seconds after SIGTERM, unless it is told to wait for the update in progress.
set -u
config=$1 output=$2
shift 2
exec torchrun --nproc_per_node="${GPUS:-8}" --shutdown-timeout="${SHUTDOWN:-1500}" \
    training/distill.py --config "$config" --output_dir "$output" --resume "$@"
