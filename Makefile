# Everything a developer or a user runs. `make help` lists it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPAT_TRANSFORMERS := 5.17.0
# The interpreter of Triton 3.6, which comes with torch 2.11, knows no newer numpy, and warns of this one.
COMPAT_NUMPY := 2.3.5
# 2.11.0, the oldest that is supported, comes from PyPI with CUDA's libraries alone: 4 GB.
COMPAT_TORCH ?= 2.13.0
COMPAT_VENV := .venv-compat-$(COMPAT_TORCH)
PROTOS := $(wildcard protos/outrider/v1/*.proto)
# The contract as the oldest version has it that may run beside this one; replaced when that version is given up.
PREDECESSOR := protos/outrider-v1.binpb
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Idle OpenMP threads sleep, as those of the workers: spinning ones take the cores that other processes need.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 20000

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Outrider needs Python 3.11 or newer; set PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt torch==2.13.0 setuptools grpcio-tools mypy-protobuf
	@$(MAKE) --no-print-directory protos/gen/.generated
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt --no-build-isolation -e '.[engine,local,bench,kubernetes,traces,dev]'
	@touch $@

protos/gen/.generated: $(PROTOS)
	@rm -rf protos/gen && mkdir -p protos/gen
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --grpc_python_out=protos/gen --mypy_out=quiet:protos/gen --mypy_grpc_out=quiet:protos/gen $(PROTOS)
	@touch $@

stubs: protos/gen/.generated ## Generate the gRPC stubs from protos/

setup: $(VENV)/.installed protos/gen/.generated ## Virtual environment, locked dependencies, generated stubs

model: setup ## Fetch and convert the sample target into the cache directory
	@$(BIN)/python -m services.engine.prepare sample >/dev/null

test: model ## Unit, integration and end-to-end tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not gpu'

demo: model ## Start everything, send three prompts with and without speculation, compare, stop
	@$(BIN)/outrider demo $(ARGS)

bench: model ## Measure the sample target over Outrider's own prompts (ARGS="--limit 8 ...")
	@$(BIN)/outrider bench $(ARGS)

bench-simulated: setup ## Speed-up against the formula, overhead a round, plain decoding against the engine driven directly; held to their goals
	$(BIN)/outrider bench --simulated --simulated-step-ms 100 --simulated-token-ms 10 --simulated-acceptance 0.7 --num-draft-tokens 4 --limit 4 --max-tokens 500 --json bench/results/simulated.json
	$(BIN)/outrider bench --overhead --max-tokens 256 --json bench/results/overhead.json
	$(BIN)/python bench/plain_overhead.py --json bench/results/plain_overhead.json
	@$(BIN)/python -m bench.simulated_goals $(addprefix bench/results/,simulated.json overhead.json plain_overhead.json)

bench-draft-length: setup ## The adaptive draft length against fixed ones, and plan's predictions, on simulated workers (draft_length.json, .png)
	$(BIN)/python -m bench.draft_length $(ARGS)

bench-draft-losses: setup ## A draft's loss, depth and width in equal time, from self-play (ARGS="--self-play my-draft/self-play")
	$(BIN)/python -m bench.draft_losses $(ARGS)

bench-commit: setup ## Tokens/s with a delay of 6 ms before Redis against those without (bench/results/commit_overlap.json)
	$(BIN)/python -m bench.commit_overlap --json bench/results/commit_overlap.json $(ARGS)

load: setup ## Overload, clients that do not read, 1,000 sessions, slow networks (bench/results/load.json; ARGS="--parts sessions")
	$(BIN)/python -m bench.load --json bench/results/load.json $(ARGS)

bench-engine: model ## The engine on this CPU beside transformers and the memory's limit (bench/results/engine.json, engine.png; ARGS=--quick)
	$(BIN)/python -m bench.engine $(ARGS)

bench-gpu: setup ## On one GPU: steps, rates and the memory's limit, transformers beside it (bench/results/gpu.json, gpu.png)
	$(BIN)/python -m bench.gpu $(ARGS)

test-gpu: setup ## Tests that need a CUDA device, and the kernels compiled for it
	$(BIN)/python -m pytest tests/gpu tests/unit/engine/cuda

lint: setup ## Format, lint, types, import contracts, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against $(PREDECESSOR)

check-distribution: setup ## Chi-square runs of verifier and engine against the exact distribution (half an hour)
	$(BIN)/python -m tests.distribution.check --json bench/results/distribution.json

check-mutants: setup ## Apply defects that break exactness or lose tokens: each test meant for one must fail (bench/results/mutants.json)
	$(BIN)/python -m tests.mutants --json bench/results/mutants.json

fuzz: setup ## Fuzz the request surface for three minutes (bench/results/fuzz.json; ARGS="--seconds 600 --seed 1000")
	$(BIN)/python -m tests.fuzz --json bench/results/fuzz.json $(ARGS)

fuzz-quick: setup ## The same for 30 seconds
	@$(BIN)/python -m tests.fuzz --seconds 30

CHAOS_FAULTS ?= 150
CHAOS_JSON := $(if $(filter 150,$(CHAOS_FAULTS)),bench/results,build)/chaos.json
chaos: setup ## Kill, pause and cut off every part under load: no token may be lost (bench/results/chaos.json; CHAOS_FAULTS=20: build/chaos.json)
	$(BIN)/python -m tests.chaos --faults $(CHAOS_FAULTS) --json $(CHAOS_JSON) $(ARGS)

chaos-quick: setup ## The same with 20 faults
	@$(BIN)/python -m tests.chaos --faults 20

chaos-sample: model ## The same with 13 faults on the sample target and the sample draft in float32 (bench/results/chaos-sample.json)
	$(BIN)/python -m tests.chaos --models sample --json bench/results/chaos-sample.json $(ARGS)

check-chaos-mutants: setup ## Defects that lose tokens, or take writes of old leases: the chaos test has to notice (bench/results/chaos-mutants.json)
	$(BIN)/python -m tests.chaos.mutants --json bench/results/chaos-mutants.json $(ARGS)

check: lint test fuzz-quick chaos-quick ## What CI runs

DEPLOY_TESTS := tests/deploy tests/integration/security $(addprefix tests/integration/test_,$(addsuffix .py,connection_age logs metrics traces)) \
	$(addprefix tests/integration/coordinator/test_,kubernetes_discovery.py fleet_quotas.py) tests/integration/common/test_redis_kinds.py \
	$(addprefix tests/unit/common/test_,api_keys.py security_config.py) tests/unit/cli/test_keys.py tests/unit/cli/top
check-deploy: setup fuzz-quick ## All of deployment: chart, Dockerfiles and compose file; certificates, keys, floods; metrics, traces, alerts
	$(BIN)/python -m deploy.tools.fetch
	$(BIN)/python -m pytest -q $(DEPLOY_TESTS)

FROM ?=
check-upgrade: setup ## Replace each part under load, by one of another version (bench/results/upgrade.json; FROM=REF: from that commit too)
	@if [ -n "$(FROM)" ]; then $(BIN)/python -m deploy.tools.predecessor "$(FROM)" build/predecessor; fi
	OUTRIDER_UPGRADE_RESULTS=bench/results/upgrade.json $(if $(FROM),OUTRIDER_PREDECESSOR=$(CURDIR)/build/predecessor) $(BIN)/python -m pytest -q tests/e2e/test_rolling_update.py tests/integration/coordinator/test_predecessor.py tests/unit/common/test_predecessor.py

images: setup ## Build the images with docker or buildah (ARGS="--variant cuda", "--base-image REF", "coordinator")
	$(BIN)/python -m deploy.tools.images $(ARGS)

images-base: ## Make the images' base from Debian's packages, where the hub can't be reached (root, mmdebstrap, buildah)
	deploy/tools/base_image.sh

check-images: setup ## Start a container of each image, ask for health, text, metrics and traces (bench/results/images.json)
	$(BIN)/python -m deploy.tools.check_images $(ARGS)

chart: setup ## Package the Helm chart into build/
	"$$($(BIN)/python -m deploy.tools.fetch helm)" package deploy/helm/outrider --destination build

PROMPTS ?= services/cli/prompts.jsonl
check-exact: model ## Tokens against transformers' generate: every drafter and draft length; how far bfloat16 diverges (PROMPTS=file)
	$(BIN)/python -m tests.exact.check_exact --prompts $(PROMPTS) --json bench/results/exact.json
	$(BIN)/python -m tests.exact.check_exact --prompts $(PROMPTS) --drafters model --draft sample-draft --json bench/results/exact-sample-draft.json
	$(BIN)/python -m tests.exact.check_exact --prompts $(PROMPTS) --draft sample-draft --temperatures 0.5,1.0 --limit 12 --max-tokens 64 --json bench/results/exact-coupled.json
	$(BIN)/python -m tests.exact.check_exact --prompts $(PROMPTS) --draft sample-draft --temperatures 0,0.5,1.0 --limit 8 --max-tokens 64 --num-draft-tokens 4 --dtype bfloat16 --json bench/results/exact-bfloat16.json

$(COMPAT_VENV)/.installed: constraints.txt pyproject.toml | protos/gen/.generated
	$(PYTHON) -m venv $(COMPAT_VENV)
	sed -e 's/^transformers==.*/transformers==$(COMPAT_TRANSFORMERS)/' -e 's/^torch==.*/torch==$(COMPAT_TORCH)/' -e 's/^numpy==.*/numpy==$(COMPAT_NUMPY)/' -e '/^huggingface_hub==/d' constraints.txt > $(COMPAT_VENV)/constraints.txt
	$(COMPAT_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c $(COMPAT_VENV)/constraints.txt torch==$(COMPAT_TORCH) setuptools
	$(COMPAT_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c $(COMPAT_VENV)/constraints.txt --no-build-isolation -e '.[engine,local,traces,dev]'
	@touch $@

check-compat: setup $(COMPAT_VENV)/.installed ## The engine's tests with the oldest transformers that it supports, in a virtual environment of its own (COMPAT_TORCH=2.11.0)
	$(COMPAT_VENV)/bin/python -m pytest -n 2 --dist worksteal -W 'ignore:Conversion of an array:DeprecationWarning' -m 'not slow and not gpu and not sample_model' tests/unit/engine tests/unit/target tests/unit/draft tests/integration/test_workers.py tests/integration/test_tensor_parallel.py

check-metrics: setup ## Dashboard and alerts in a real Prometheus that scrapes real services (Debian's package prometheus)
	@command -v prometheus promtool >/dev/null || { echo "install Debian's package prometheus first" >&2; exit 1; }
	$(BIN)/python -m pytest -q tests/deploy/test_prometheus.py tests/deploy/test_names.py

format: setup ## Format the code and sort the imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment, the stubs and every cache of this checkout
	rm -rf $(VENV) $(COMPAT_VENV) protos/gen build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help stubs setup model demo bench bench-simulated bench-commit bench-draft-length bench-draft-losses bench-engine bench-gpu test test-gpu lint check check-compat check-exact check-metrics format clean fuzz fuzz-quick chaos chaos-quick chaos-sample check-chaos-mutants check-distribution check-mutants check-deploy check-upgrade images images-base check-images chart load
