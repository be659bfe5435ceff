# Everything a developer or a user runs. `make help` lists it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/outrider/v1/*.proto)
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Outrider needs Python 3.11 or newer; set PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt torch==2.13.0 setuptools grpcio-tools mypy-protobuf
	@$(MAKE) --no-print-directory protos/gen/.generated
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt --no-build-isolation -e '.[engine,local,bench,kubernetes,dev]'
	@touch $@

protos/gen/.generated: $(PROTOS)
	@rm -rf protos/gen && mkdir -p protos/gen
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --grpc_python_out=protos/gen --mypy_out=quiet:protos/gen --mypy_grpc_out=quiet:protos/gen $(PROTOS)
	@touch $@

stubs: protos/gen/.generated ## Generate the gRPC stubs from protos/

setup: $(VENV)/.installed protos/gen/.generated ## Virtual environment, locked dependencies, generated stubs

.PHONY: help stubs setup
