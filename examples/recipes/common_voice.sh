#!/usr/bin/env bash
# Common Voice 13, by its own language codes: DATASET=cv-corpus-13.0-2023-03-09 bash examples/recipes/common_voice.sh ca uk
# DATASET is the folder of the unpacked archives: a folder a language, with train.tsv, test.tsv and clips/.
# Variables and options: README.md.
set -euo pipefail

export OUTPUT=${OUTPUT:-runs/common-voice}
exec bash "$(dirname "$0")/paper.sh" --dataset "${DATASET:-cv-corpus-13.0-2023-03-09}" --dataset_config '{language}' \
    --text_column sentence --max_train_samples 10000 --languages "$@"
