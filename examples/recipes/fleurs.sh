#!/usr/bin/env bash
# FLEURS, by its own language codes: METHOD=distil bash examples/recipes/fleurs.sh ca_es uk_ua [options]
# Variables and options: README.md.
set -euo pipefail

export OUTPUT=${OUTPUT:-runs/fleurs}
# On the Hub the dataset itself is a script, which `datasets` does not run; that branch has it in Parquet.
exec bash "$(dirname "$0")/paper.sh" --dataset "${DATASET:-google/fleurs}" --dataset_config '{language}' \
    --dataset_revision refs/convert/parquet --text_column transcription --languages "$@"
