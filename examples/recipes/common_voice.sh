#!/usr/bin/env bash
# Common Voice, by its own language codes: DATASET=mdc:ID bash examples/recipes/common_voice.sh ca
# DATASET is the ID of one language at Mozilla Data Collective (docs/how-to/recordings.md), or the folder of
# unpacked archives: a folder a language, with train.tsv, test.tsv and clips/.
# Variables and options: README.md.
set -euo pipefail

export OUTPUT=${OUTPUT:-runs/common-voice}
dataset=${DATASET:-cv-corpus-13.0-2023-03-09}
columns=(--text_column sentence)
[[ $dataset == mdc:* ]] || columns+=(--dataset_config '{language}')
exec bash "$(dirname "$0")/paper.sh" --dataset "$dataset" "${columns[@]}" \
    --most_upvoted 10000 --languages "$@"
