# Everything happens in .venv; every target does its own set-up, and the README and .ci/run use the same.
PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
OUT ?= report
# Of tests: one more than two cores, for some wait.
WORKERS ?= 3
# Set, it would have every process compile every module that it imports: torch and diffusers, many seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test lint bench docs full longest gpu-check clean

setup: .venv/ready
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup bundles/demo/manifest.json
	mkdir -p demo
	$(BIN)/svd-engine generate engine/svd_engine/assets/coffee.png --bundle bundles/demo --fit crop \
	  --output demo/demo.mp4 --output demo/demo.webp --report demo/demo.json
DEMO := engine/svd_engine/assets/demo
bundles/demo/manifest.json: $(wildcard $(DEMO)/*.json $(DEMO)/*/*) | setup
	mkdir -p bundles && rm -rf bundles/demo
	$(BIN)/svd-export onnx demo --output bundles/demo

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder -p no:benchmark

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup
	$(BIN)/svd-bench run --checkpoint demo --frames 4 --steps 3 --repeat 3 --device cpu --out $(OUT)
	$(BIN)/svd-bench ladder --checkpoint demo --frames 4 --rungs ends --repeat 3 --device cpu --out $(OUT)
	$(BIN)/python -m pytest benchmarks --benchmark-only

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(BIN)/python -m mkdocs build --strict
	@echo "site/index.html; with its search: python3 -m http.server --directory site"

full: setup
	$(BIN)/python -m pytest tests/full -m "full and not longest" --numprocesses 2 --dist loadscope -rP

longest: setup
	$(BIN)/python -m pytest tests/full -m full -s

# From a checkout, without installing anything: torch and the packages of pyproject must be importable.
gpu-check:
	PYTHONPATH=engine:export:benchmarks $(or $(wildcard $(BIN)/python),python3) -m svd_bench.gpu_check --out $(OUT)

clean:
	rm -rf .venv bundles build dist site
