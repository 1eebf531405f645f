PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache

# The demo needs less than the tests. Where the environment of the tests exists, the demo uses it.
DEMO_ENV := $(if $(wildcard $(VENV)/.installed-test),$(VENV)/.installed-test,$(VENV)/.installed-demo)
TEST_ENV := $(VENV)/.installed-test

# The demo: a Romanian expert for whisper-base, on 2 CPU cores. `make demo DEMO_EXTRA="--seed 1"` adds options.
DEMO_LANGUAGE ?= ro
DEMO_DATA := --student $(CACHE)/whisper-base --dataset $(CACHE)/tuxpaint-$(DEMO_LANGUAGE) --languages $(DEMO_LANGUAGE)
# bfloat16 halves a training step on a CPU that has such instructions. On others it takes many times as long.
BF16 := $(if $(shell grep -wE "avx512_bf16|amx_bf16|bf16" /proc/cpuinfo 2>/dev/null),True,False)
# How the recipe was found: docs/explanation/demo.md.
DEMO_RECIPE ?= --single 0.2 --no_speech 0.05 --num_train_epochs 4 --label_smoothing_factor 0.1 --bf16 $(BF16) --use_cpu True \
	--max_new_tokens 64 --logging_steps 25
DEMO_OUTPUT ?= --output_dir runs/demo-$(DEMO_LANGUAGE)
DEMO_EXTRA ?=
DEMO_ARGS ?= $(DEMO_DATA) $(DEMO_RECIPE) $(DEMO_OUTPUT) $(DEMO_EXTRA)

# The same command in a few steps, with a teacher, so that every part of it runs.
SMOKE_ARGS ?= $(DEMO_DATA) $(DEMO_RECIPE) --teacher $(CACHE)/whisper-base --output_dir runs/smoke --overwrite \
	--teacher_cache runs/smoke/teacher \
	--max_steps 6 --max_train_samples 32 --max_eval_samples 4

# Two workers of one thread each: the tests are many and small. Each takes half of the list, so that what the tests of a
# file share is made once, and then from the half of the other.
PYTEST_ARGS ?= -q -n 2 --dist worksteal

# The oldest transformers and PEFT that setup.cfg allows, and the newest that the registry has, each with its own
# requirements. All other versions are those of constraints.txt.
test-oldest: REQUIREMENTS = $(shell sed -nE 's/^ *(transformers|peft)>=([^,]*).*/\1==\2/p' setup.cfg)
test-newest: REQUIREMENTS = --upgrade transformers peft

.PHONY: help venv lint format test test-oldest test-newest docs dist fetch demo demo-smoke new-language bench-train \
	bench-infer bench-silence compare evidence evidence-smoke notebook screenshots clean

help:
	@echo "make demo        fetch whisper-base and recordings, train a language expert, show the table"
	@echo "make demo-smoke  the same with a few steps"
	@echo "make new-language"
	@echo "                 an expert for a language that Whisper does not know, on synthetic speech"
	@echo "make notebook    run examples/your_language.ipynb on a few recordings"
	@echo "make bench-train time and memory of training steps, against LoRA and full fine-tuning; speech trained on a second"
	@echo "make bench-infer time of inference, against the base, LoRA and both paths"
	@echo "make bench-silence"
	@echo "                 words invented in silence, noise and music, with and without --vad"
	@echo "make compare     the paper's comparison of methods on real speech: a night on 2 cores"
	@echo "make evidence    its second round, with packing and three folds: days on 2 cores, a call goes on where it stopped"
	@echo "make test        run the tests"
	@echo "make test-oldest, make test-newest"
	@echo "                 the same with the oldest and the newest transformers and PEFT, in separate environments"
	@echo "make lint        check code, types, and imports between rooms; make format formats the code"
	@echo "make docs        build the documentation site in site/, with links checked"
	@echo "make dist        build sdist and wheel, and try the wheel in a clean environment"
	@echo "make clean       remove environments, builds and what runs wrote (downloads in $(CACHE) stay)"

venv: $(TEST_ENV)

$(VENV)/.installed-demo: EXTRAS = train,plots,transcribe,vad
$(VENV)/.installed-test: EXTRAS = test,lint,dist,docs
$(VENV)/.installed-demo $(VENV)/.installed-test: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "No virtual environment could be made with '$(PYTHON)'." \
			"On Debian and Ubuntu: apt-get install python3-venv (or name another Python: make venv PYTHON=python3.12)." >&2; \
		exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lint: $(TEST_ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(TEST_ENV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(TEST_ENV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	grep -vE '^(transformers|peft|tokenizers|huggingface_hub)==' constraints.txt >.venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet -c .venv-$*/constraints.txt -e '.[test]' $(REQUIREMENTS)
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(PYTEST_ARGS)

dist: $(TEST_ENV)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . >dist.log || { cat dist.log; exit 1; }
	@rm dist.log
	$(BIN)/twine check --strict dist/*
	PYTHON=$(abspath $(BIN)/python) bash tests/scripts/check_dist.sh dist

# Not --quiet: it hides warnings from --strict.
docs: $(TEST_ENV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

fetch: $(DEMO_ENV)
	@$(BIN)/python -m examples.demo.fetch --cache_dir $(CACHE) --language $(DEMO_LANGUAGE)

demo: fetch
	$(BIN)/peft-clsr train $(DEMO_ARGS)

demo-smoke: fetch
	rm -rf runs/smoke
	$(BIN)/peft-clsr train $(SMOKE_ARGS)

# BENCH_ARGS="--rounds 1 --batch_size 1 --kd_labels 1 16" runs every part of it in seconds.
bench-train: fetch
	$(BIN)/python -m benchmarks.train $(BENCH_ARGS)

# An expert for a language that Whisper has no token for: 15 minutes of a core that has bfloat16 instructions.
# NEW_LANGUAGE_ARGS="--max_steps 2 --test_size 4" is quick.
new-language: $(TEST_ENV)
	$(BIN)/python -m examples.new_language --model $(CACHE)/whisper-base $(if $(filter True,$(BF16)),--bf16) \
		$(NEW_LANGUAGE_ARGS)

# The notebook for your language, in two steps on a few recordings.
notebook: $(TEST_ENV) fetch
	$(BIN)/python tests/scripts/run_notebook.py --cache_dir $(CACHE) --output_dir runs/smoke/notebook

# The pictures of `peft-clsr app` in the docs, with the demo's expert: after `make demo`. They need Debian's chromium.
screenshots: $(TEST_ENV) fetch
	PEFT_CLSR_PICTURES=docs/images PEFT_CLSR_SHOWN=$(CACHE)/whisper-base:runs/demo-ro/ro:$(CACHE)/tuxpaint-ro/test \
		$(BIN)/python -m pytest -q tests/app/test_browser.py -k "example or narrow"

# With the demo's adapter, if `make demo` has trained it. BENCH_ARGS="--rounds 1 --batch_sizes 1 --new_tokens 4" is quick.
BENCH_ADAPTERS ?= $(wildcard runs/demo-$(DEMO_LANGUAGE)/$(DEMO_LANGUAGE))

bench-infer: fetch
	$(BIN)/python -m benchmarks.infer --adapters $(BENCH_ADAPTERS) $(BENCH_ARGS)

# BENCH_ARGS="--adapters FOLDER ..." measures experts, too. BENCH_ARGS="--seconds 4 --limit 20" is quick.
bench-silence: fetch
	$(BIN)/python -m benchmarks.silence --cache_dir $(CACHE) $(BENCH_ARGS)

# The paper's comparison: docs/results/index.md. Finished runs are not repeated. COMPARE_ARGS="--groups tuning main --seeds 0"
# runs a part of it.
COMPARE_ARGS ?= --jobs 2

compare: $(TEST_ENV)
	$(BIN)/python -m benchmarks.comparison.speech --cache_dir $(CACHE)
	$(BIN)/python -m benchmarks.comparison.compare $(COMPARE_ARGS)
	$(BIN)/python -m benchmarks.comparison.report

# The second round: docs/results/index.md. EVIDENCE_ARGS="--jobs 2 --groups main --budget_minutes 240" runs a part of it.
EVIDENCE_ARGS ?= --jobs 2
ABILITIES_ARGS ?= --jobs 2

evidence: $(TEST_ENV)
	$(BIN)/python -m benchmarks.evidence.speech --cache_dir $(CACHE)
	$(BIN)/python -m benchmarks.evidence.run $(EVIDENCE_ARGS)
	$(BIN)/python -m benchmarks.evidence.abilities $(ABILITIES_ARGS)
	$(BIN)/python -m benchmarks.evidence.report

# All steps of it for a few training steps, with the method that demo-smoke does not have.
evidence-smoke: $(TEST_ENV)
	$(BIN)/python -m benchmarks.evidence.speech --cache_dir $(CACHE) --languages ro be ru ca
	rm -rf runs/smoke/evidence
	$(BIN)/python -m benchmarks.evidence.run --groups main --methods zero-shot full --languages ro --folds 0 \
		--jobs 2 --max_steps 2 --max_utterances 4 --results_dir runs/smoke/evidence/results --work_dir runs/smoke/evidence
	$(BIN)/python -m benchmarks.evidence.abilities --languages ro --folds 0 \
		--jobs 2 --max_steps 2 --max_utterances 4 --results_dir runs/smoke/evidence/results --work_dir runs/smoke/evidence
	$(BIN)/python -m benchmarks.evidence.report --max_steps 2 --results_dir runs/smoke/evidence/results \
		--output_dir runs/smoke/evidence/report

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache runs/smoke
	find . -name __pycache__ -type d -not -path './$(CACHE)/*' -prune -exec rm -rf {} +
