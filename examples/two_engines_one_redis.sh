#!/bin/sh
# Two engines on two GPUs share one Redis: what one has prefilled, the other loads.
#     examples/two_engines_one_redis.sh MODEL redis://localhost:6379/0
set -eu
model=$1
export RAGKV_REDIS_URL=$2 RAGKV_MEMORY_CAPACITY="${RAGKV_MEMORY_CAPACITY:-8GiB}"
trap 'kill 0' INT TERM EXIT
CUDA_VISIBLE_DEVICES=0 ragkv serve "$model" --port 8000 &
CUDA_VISIBLE_DEVICES=1 ragkv serve "$model" --port 8001 &
wait
