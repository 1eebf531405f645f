#!/usr/bin/env bash
# Checks the built sdist and wheel in the folder $1: the sdist's tests can be collected, and the wheel works in a clean
# environment with its runtime dependencies alone. PYTHON is a Python with the test dependencies.
set -euo pipefail

dist=$(realpath "$1")
root=$(pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Relative links do not work on PyPI.
if grep -nE '\]\(' README.md | sed -E 's/\]\((https?:|#)//g' | grep -E '\]\('; then
    echo "README.md: these links must be absolute" >&2
    exit 1
fi

mkdir "$scratch/sdist"
tar -xzf "$dist"/peft_clsr-*.tar.gz -C "$scratch/sdist" --strip-components 1
# Collects all, and runs those of one file.
(cd "$scratch/sdist" && PYTHONPATH="$scratch/sdist" "$PYTHON" -m pytest -q -p no:cacheprovider -k test_tags | tail -n 1)

"$PYTHON" -m venv "$scratch/clean"
# To compile all modules takes longer than to compile those that are imported here.
"$scratch/clean/bin/python" -m pip install --quiet --no-compile -c "$root/constraints.txt" "$dist"/peft_clsr-*.whl
mkdir "$scratch/empty"
cd "$scratch/empty"
"$scratch/clean/bin/python" "$root/tests/scripts/wheel_smoke.py"
"$scratch/clean/bin/peft-clsr" train --help >/dev/null
if "$scratch/clean/bin/peft-clsr" train --student a --dataset b --languages ca --output_dir c 2>error; then exit 1; fi
grep -q "pip install 'peft_clsr\[train\]'" error
echo "the wheel works in a clean environment: $(basename "$dist"/peft_clsr-*.whl)"
