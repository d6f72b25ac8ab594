# The commands of this project; everything installs into $(VENV) by the pins of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 60
RUNS ?= 3
READY := $(VENV)/.ready
HAS_GPU := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

PEERS := out/peers/venv

.PHONY: demo test check fuzz reliability bench bench-gpu bench-peers format clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned set-up needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[eval,formats,kernels,ray,serve,dev]"
	touch $(READY)

demo: $(READY)  ## compress the built-in model, evaluate it, write the report
	$(BIN)/compress run quickstart --out out/quickstart --force
	$(BIN)/compress run wanda-2of4-gptq-int4 --out out/wanda-2of4-gptq-int4 --force
	$(BIN)/compress verify out/quickstart
	$(BIN)/compress eval out/quickstart out/wanda-2of4-gptq-int4 --out out/demo.eval

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: $(READY)  ## format, lint, types and the quick tests: three to five minutes on two cores
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

fuzz: $(READY)  ## any bytes as recipe, headers, config and weights, for FUZZ_SECONDS; under atheris if pip installs it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]" || echo 'no atheris here: under hypothesis'
	$(BIN)/python tests/fuzz/run.py $(FUZZ_SECONDS)

reliability: fuzz  ## the table of faults, bad input, damage and fuzzing: what was tried and what held
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m fault

bench: $(READY)  ## measured tables: CPU kernels, speed, pruning, quantization, caches, deltas, a 4 GB model, the recipes; takes hours
	$(BIN)/python -m compress_kernels.bench
	$(BIN)/python -m compress_kernels.gpu.aot
	if $(HAS_GPU); then $(MAKE) bench-gpu; else echo 'no GPU here: kernels are not measured'; fi
	$(BIN)/python -m compress_evals.speed
	$(BIN)/python -m compress_evals.streaming
	$(BIN)/python -m compress_evals.pruning
	$(BIN)/python -m compress_evals.quantization --check
	$(BIN)/python -m compress_evals.kv
	$(BIN)/python -m compress_evals.likelihoods
	$(BIN)/python -m compress_evals.latent
	$(BIN)/python -m compress_evals.lowrank --out out/lowrank
	$(BIN)/python -m compress_evals.matrices
	$(BIN)/python -m compress.builtin.finetune --ability facts --out out/ft-facts
	$(BIN)/python -m compress.builtin.finetune --ability arithmetic --out out/ft-arithmetic
	$(BIN)/python -m compress_evals.deltas out/ft-facts out/ft-arithmetic --check
	$(BIN)/python -m compress_evals.tenants
	$(BIN)/python -m compress_evals.bench --out out/bench

bench-gpu: $(READY)  ## on a GPU: what must be true of it, every kernel beside its peers as JSON lines, a picture
	$(BIN)/python -m compress_kernels.bench.first
	$(BIN)/python -m compress_kernels.bench.gpu --out out/kernels/lines.jsonl
	$(BIN)/python -m compress_kernels.bench.plot out/kernels/lines.jsonl out/kernels/speedup.png

# the tools of others pin older versions of what we use: they get an environment of their own
$(PEERS)/.ready:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0+cpu" llmcompressor gptqmodel auto-round nvidia-modelopt optimum
	touch $(PEERS)/.ready

bench-peers: $(READY) $(PEERS)/.ready  ## the same jobs by us and by llm-compressor, Model Optimizer, GPTQModel and AutoRound; takes an hour
	$(BIN)/python -m compress_evals.peers --runs $(RUNS)

format: $(READY)  ## rewrite the code in the house's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the commands above made
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache
