#!/usr/bin/env bash
# FLEURS, by its own language codes: METHOD=distil bash examples/recipes/fleurs.sh ca_es uk_ua [options]
# Variables and options: README.md.
set -euo pipefail

export OUTPUT=${OUTPUT:-runs/fleurs}
configs=() languages=()
while (($#)) && [[ $1 != -* ]]; do
    configs+=("$1") languages+=("${1%%_*}") # "ca_es" is Catalan of any region
    shift
done
dataset=${DATASET:-google/fleurs}
columns=(--text_column transcription)
# On the Hub the dataset itself is a script, which `datasets` does not run; that branch has it in Parquet.
[[ -e $dataset ]] || columns+=(--dataset_revision refs/convert/parquet)
exec bash "$(dirname "$0")/paper.sh" --dataset "$dataset" --dataset_config "${configs[@]}" "${columns[@]}" \
    --languages "${languages[@]}" "$@"
