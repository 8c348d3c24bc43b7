# Agent360 Mesh. `make help` prints the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2

.PHONY: help
help:  ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable '.[server,redis,cassandra,top]' --group dev
	@touch $@

.PHONY: install
install: $(VENV)/.installed  ## make .venv with everything a developer needs
	@scripts/install-tools.sh

.PHONY: test
test: install  ## run the whole test suite; what cannot run says why at the end
	@PATH="$(CURDIR)/.cache/bin:$$PATH" $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

.PHONY: check
check: $(VENV)/.installed  ## lint, types, proto lint, stub drift and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	scripts/protos.sh lint
	scripts/protos.sh drift
	$(BIN)/python scripts/synchronous.py --check
	$(BIN)/lint-imports --no-cache

.PHONY: protos
protos: $(VENV)/.installed  ## generate the stubs in clients/ from protos/
	scripts/protos.sh generate clients

.PHONY: synchronous
synchronous: $(VENV)/.installed  ## generate the synchronous clients from the asynchronous ones
	$(BIN)/python scripts/synchronous.py

.PHONY: up
up: $(VENV)/.installed  ## run the mesh in the foreground
	$(BIN)/agent360-mesh up

.PHONY: demo
demo: $(VENV)/.installed  ## stream a few hundred requests through the mesh (UPSTREAM=URL MODEL=NAME: a real model)
	@$(BIN)/agent360-mesh demo $(if $(UPSTREAM),--upstream $(UPSTREAM)) $(if $(MODEL),--model $(MODEL))

.PHONY: cassandra
cassandra:  ## run a Cassandra of one node on port 9042 until Ctrl-C; its data stays in .cache/cassandra/node
	@scripts/cassandra.sh run .cache/cassandra/node 9042 7000

.PHONY: containers
containers:  ## build the container images of the four services
	@scripts/containers.sh

.PHONY: litellm
litellm:  ## install the LiteLLM proxy in .cache/litellm, for bench inference (about 750 MB)
	@$(PYTHON) -m venv .cache/litellm
	@.cache/litellm/bin/pip install --quiet 'litellm[proxy]>=1.80'

.PHONY: bench
bench: $(VENV)/.installed  ## what a call costs beside bare gRPC
	$(BIN)/agent360-mesh bench calls
