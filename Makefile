# Everything happens in .venv; every target does its own set-up, and the README and .ci/run use the same.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test lint full clean

setup: .venv/ready
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup bundles/demo/manifest.json
	$(BIN)/svd-engine generate engine/svd_engine/assets/rocket.jpg --bundle bundles/demo \
	  --output demo/demo.mp4 --output demo/demo.png --report demo/demo.json
bundles/demo/manifest.json: | setup
	mkdir -p bundles && rm -rf bundles/demo
	$(BIN)/svd-export onnx demo --output bundles/demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

full: setup
	$(BIN)/python -m pytest tests/full -m full -s

clean:
	rm -rf .venv bundles build dist
