#!/usr/bin/env bash
# The models, methods and settings of "Multilingual DistilWhisper" (Ferraz et al., ICASSP 2024), on data that fleurs.sh
# and common_voice.sh name: use those.
set -euo pipefail

METHOD=${METHOD:-distil}
GPUS=${GPUS:-1}
STUDENT=${STUDENT:-openai/whisper-small}
TEACHER=${TEACHER:-openai/whisper-large-v2}
: "${OUTPUT:?use fleurs.sh or common_voice.sh, which set it}"

folder=$(dirname "$0")
case $METHOD in
    distil) method=(--config "$folder/paper.yaml" --teacher "$TEACHER" --teacher_cache "$OUTPUT/teacher-states") ;;
    clsr) method=(--config "$folder/paper.yaml") ;;
    lora) method=(--config "$folder/lora.yaml") ;;
    *)
        echo "METHOD is '$METHOD', expected distil, clsr or lora" >&2
        exit 2
        ;;
esac
case $GPUS in
    1 | 2 | 4 | 8 | 16) ;;
    *)
        echo "GPUS is '$GPUS', expected 1, 2, 4, 8 or 16: the batch of 16 is split among them" >&2
        exit 2
        ;;
esac
# One process that sees several GPUs would split batches among them by itself.
[[ $GPUS == 1 ]] && export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
bf16=$(python -c 'import torch; print(torch.cuda.is_available() and torch.cuda.is_bf16_supported())')

# LAUNCH and "$@" come last: what is given there replaces what is here.
# shellcheck disable=SC2086
exec accelerate launch --num_machines 1 --num_processes "$GPUS" --mixed_precision no --dynamo_backend no ${LAUNCH:-} \
    -m peft_clsr train \
    --student "$STUDENT" "${method[@]}" --output_dir "$OUTPUT/$METHOD" \
    --per_device_train_batch_size $((16 / GPUS)) \
    --bf16 "$bf16" --ddp_find_unused_parameters False \
    --per_device_eval_batch_size 16 --preprocessing_workers 4 --dataloader_num_workers 2 \
    --save_strategy epoch --save_total_limit 1 --logging_steps 25 --keep_checkpoints \
    "$@"
