# make quickstart   set up, train on real handwritten digits, evaluate (downloads only packages)
# make test         linters, type checker, import order, the tests
# make test-slow    the slowest tests, which show more of what the others show
# make compile-check   compile kernels and whole networks for TPUs and an H200, without one (4.4 GB of
#                      NVIDIA's packages in an environment of their own; compile-tpu: TPUs only)
# make fuzz         22,000 damaged weight files, 20,000 command lines, recipes and settings, 10,000
#                   damaged image files and 500 odd folders of images, none of which may crash, hang
#                   or leave a file behind (6 to 10 minutes). For a long run:
#                   python -m tests.interchange.fuzz --files 1000000 --originals 0.005
# make docs         build the documentation site in build/docs; warnings are errors
# make release      build sdist and wheel in dist/, check them, use each in an empty environment
# make torture      kill 60 training runs at critical moments and compare how they end (20 minutes)
# make results      write the tables in docs/results.md and README.md and the figure from results/
# make clean        remove the environment and the quickstart's run

# The first of these that runs and is new enough; to use another: make test PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
BIN := $(VENV)/bin
# What is used of the packages is compiled at its first import; all of it takes half of pip's time.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile
WORKDIR ?= runs/quickstart
RESULTS := results results/short results/distilled
COMPILED := tests/kernels/compiled.sha256
COMPILED_DIGEST := { find shiftnet/kernels shiftnet/layers benchmarks/packed_matmul \
	tests/kernels/compile_*.py tests/benchmarks/compile_*.py shiftnet/planning/*.txtpb \
	-name '*.*' -not -name '*.pyc' -not -name selftest.py \
	-not -name cpu.py -not -name few_images.py -not -name native.py -not -name '*.cc' -not -name '*.h' \
	| LC_ALL=C sort | xargs cat; grep '^jax' requirements.txt; } | sha256sum

.PHONY: docs quickstart test test-slow compile-check compile-tpu compile-gpu compile-check-if-changed \
	fuzz release results torture clean

quickstart: $(VENV)/package
	rm -rf $(WORKDIR)
	$(BIN)/python train.py --config configs/quickstart.py --workdir $(WORKDIR)
	$(BIN)/python evaluate.py --ckpt $(WORKDIR) --per-class
	@echo
	@echo "Where to go next:"
	@echo "  . $(BIN)/activate"
	@echo "  python train.py --config configs/shiftresnet20_c100.py:expansion=3   # downloads CIFAR-100"
	@echo "  tensorboard --logdir runs                                            # pip install tensorboard"
	@echo "  README.md: your own images, low-bit weights, GPUs and TPUs, use from Python"

test: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 -m slow

# Runs the compilers for devices that are not here.
compile-check: compile-tpu compile-gpu
	$(COMPILED_DIGEST) >$(COMPILED)

compile-tpu: $(VENV)/dev
	$(BIN)/python -m tests.kernels.compile_nets

compile-gpu: $(CUDA_VENV)/cuda
	$(CUDA_VENV)/bin/python -m tests.kernels.compile_gpu
	$(CUDA_VENV)/bin/python -m tests.benchmarks.compile_packed_gpu

# CI calls this: it does nothing if compile-check passed with exactly these files, by the digest it wrote.
compile-check-if-changed:
	@if [ "$$($(COMPILED_DIGEST))" = "$$(cat $(COMPILED))" ]; then \
		echo "kernels and layers compiled for TPUs and an H200 as they are"; \
	else $(MAKE) compile-check && echo "commit $(COMPILED)"; fi

docs: $(VENV)/dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

release:
	tools/release.sh $(PYTHON)

fuzz: $(VENV)/dev
	$(BIN)/python -m tests.fuzz_commands
	$(BIN)/python -m tests.interchange.fuzz
	$(BIN)/python -m tests.data.fuzz

results: $(VENV)/dev
	$(BIN)/python -m shiftnet report $(RESULTS) results/smoke --out docs/results.md
	$(BIN)/python -m shiftnet report $(RESULTS) --brief --out README.md
	$(BIN)/python -m shiftnet report $(RESULTS) --out docs/accuracy_against_bytes.svg

torture: $(VENV)/dev
	$(BIN)/python -m tests.torture

$(VENV)/base: requirements.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11, 3.12 or 3.13; name it with PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -r requirements.txt
	touch $@

# The command shiftnet, from this checkout.
$(VENV)/package: $(VENV)/base pyproject.toml
	$(BIN)/$(PIP) --no-deps --editable .
	touch $@

$(VENV)/dev: $(VENV)/base pyproject.toml
	$(BIN)/$(PIP) -r requirements.txt --editable ".[dev]"
	touch $@

$(CUDA_VENV)/cuda: requirements.txt
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/$(PIP) -r requirements.txt
	$(CUDA_VENV)/bin/$(PIP) "jax[cuda13]" absl-py
	touch $@

clean:
	rm -rf $(VENV) runs/quickstart
