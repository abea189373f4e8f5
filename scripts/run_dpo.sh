#!/usr/bin/env bash
# Direct preference optimization. MODEL, TRAIN, HELD_OUT and NPROC choose the model, the rows and the number of processes; flags that follow win.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m torch.distributed.run --nproc_per_node "${NPROC:-1}" scripts/dpo_training.py \
    --model_name_or_path "${MODEL:-smollm2-135m-instruct}" \
    --train_file_dir "${TRAIN:-examples/pairs}" \
    --validation_file_dir "${HELD_OUT:-examples/heldout_pairs}" \
    --model_type auto \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 1 \
    --do_train \
    --do_eval \
    --use_peft True \
    --max_train_samples 1000 \
    --max_eval_samples 10 \
    --max_steps 100 \
    --eval_steps 20 \
    --save_steps 50 \
    --max_source_length 256 \
    --max_target_length 256 \
    --output_dir outputs-dpo-v1 \
    --overwrite_output_dir \
    --target_modules all \
    --lora_rank 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --torch_dtype bfloat16 \
    --bf16 True \
    --device_map auto \
    --report_to tensorboard \
    --remove_unused_columns False \
    --gradient_checkpointing True \
    --cache_dir ./cache \
    "$@"
