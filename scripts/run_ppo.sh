#!/usr/bin/env bash
# PPO. REWARD_MODEL or REWARD_ADAPTER gives the scores. MODEL, TRAIN, HELD_OUT and NPROC choose the model, the rows and the number of processes; flags that follow win.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m torch.distributed.run --nproc_per_node "${NPROC:-1}" scripts/ppo_training.py \
    --model_name_or_path "${MODEL:-smollm2-135m-instruct}" \
    --train_file_dir "${TRAIN:-examples/sft}" \
    --validation_file_dir "${HELD_OUT:-examples/heldout}" \
    --model_type auto \
    ${REWARD_MODEL:+--reward_model_name_or_path "$REWARD_MODEL"} \
    ${REWARD_ADAPTER:+--reward_adapter "$REWARD_ADAPTER"} \
    --torch_dtype bfloat16 \
    --device_map auto \
    --batch_size 8 \
    --max_source_length 256 \
    --max_target_length 256 \
    --max_train_samples 1000 \
    --use_peft True \
    --lora_rank 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --do_train \
    --max_steps 100 \
    --learning_rate 1e-5 \
    --save_steps 50 \
    --output_dir outputs-rl-v1 \
    --overwrite_output_dir \
    --early_stopping True \
    --target_kl 0.1 \
    --reward_baseline 0.0 \
    "$@"
