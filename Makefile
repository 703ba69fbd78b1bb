# By hand and in CI the same verbs. `make help` lists them.

PY ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PROTO_VENV := .venv-proto
OLDEST_VENV := .venv-protobuf
NEXT_VENV := .venv-transformers5
RAY_VENV := .venv-ray

# The oldest generator, since code from a newer one refuses to load on an older protobuf runtime.
GENERATOR := grpcio-tools==1.71.2 mypy-protobuf==3.7.0
GENERATED := $(PROTO_VENV)/.grpcio-tools-1.71.2-mypy-protobuf-3.7.0
WIRE_TESTS := tests/middleware/test_client.py tests/middleware/test_async_client.py tests/middleware/test_turns.py tests/middleware/ext_proc/test_protocol.py tests/service/test_errors.py tests/service/test_servicer.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test install lint format format-check types check proto proto-check \
  test-protobuf test-transformers test-ray bench chaos clean

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.base ## start the service with the starter guard; ARGS="--port 50052" passes flags on
	@echo "guardctl is $(BIN)/guardctl"
	@GUARD_LOG_FORMAT=$${GUARD_LOG_FORMAT:-text} exec $(BIN)/python -m guard_service $(ARGS)

test: $(VENV)/.dev ## run all tests; ARGS="-k policy" passes arguments on
	$(BIN)/python -m pytest $(ARGS)

install: $(VENV)/.dev ## make .venv with what tests, linter and type checker need

lint: $(VENV)/.dev ## find mistakes that a linter can find
	$(BIN)/ruff check .

format: $(VENV)/.dev ## lay out the code
	$(BIN)/ruff check --select I --fix --quiet .
	$(BIN)/ruff format .

format-check: $(VENV)/.dev ## fail if `make format` would change a file
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## check types, strictly
	$(BIN)/mypy

check: format-check lint types proto-check test ## all that must hold before a commit

proto: $(GENERATED) ## write the Python code of proto/ anew
	$(call generate,proto)

proto-check: $(GENERATED) ## fail if the committed code of proto/ is stale
	@made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && $(call generate,"$$made") && \
	  diff -rq -x __pycache__ -x __init__.py -x '*.proto' -x py.typed "$$made/guard_api" proto/guard_api \
	  || { echo "proto/guard_api is stale: run make proto" >&2; exit 1; }

test-protobuf: $(OLDEST_VENV)/.made ## run the wire's tests on the oldest protobuf and grpcio (make test: on the newest)
	$(OLDEST_VENV)/bin/python -m pytest -q $(WIRE_TESTS)

test-transformers: $(NEXT_VENV)/.made ## run the torch engine's tests on transformers 5 (make test: on 4.57)
	$(NEXT_VENV)/bin/python -m pytest -q tests/service/torch

test-ray: $(RAY_VENV)/.made ## run the tests that need Ray (make test leaves them out)
	$(RAY_VENV)/bin/python -m pytest -q -W ignore::ResourceWarning -W "ignore::pytest.PytestUnraisableExceptionWarning" tests/on_ray $(ARGS)

bench: $(VENV)/.base ## measure the starter guard here: latency, verdicts a second, what the service adds
	$(BIN)/guardctl bench --compare-engine $(ARGS)

chaos: $(VENV)/.dev ## minutes of mixed load while guards die and hang; ARGS="--minutes 5 --seed 1"
	@$(BIN)/python -m tests.chaos $(ARGS)

clean: ## remove the virtual environments, caches and builds
	rm -rf .venv $(PROTO_VENV) $(OLDEST_VENV) $(NEXT_VENV) $(RAY_VENV) .mypy_cache .ruff_cache .pytest_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call generate,FOLDER): the Python code of proto/*.proto, written below FOLDER
generate = PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" $(PROTO_VENV)/bin/python -m grpc_tools.protoc \
  -I proto --python_out=$(1) --grpc_python_out=$(1) \
  --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(wildcard proto/guard_api/v1/*.proto proto/guard_api/ext_proc/v3/*.proto)

# $(call virtual,FOLDER): a virtual environment. Without pip in it (Debian's python3 without
# python3-venv) it is not made, and says so.
define virtual
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "needs Python 3.11 or newer; name one: make PY=python3.12 ..." >&2; exit 1; }
	@$(PY) -m venv $(1) || \
	  { echo "$(PY) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
endef

$(BIN)/pip:
	$(call virtual,$(VENV))

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing the service into $(VENV) ..."
	@$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing what the tests need into $(VENV) (torch too, this takes a while) ..."
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.base

$(GENERATED):
	$(call virtual,$(PROTO_VENV))
	@$(PROTO_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(GENERATOR)
	@touch $@

$(OLDEST_VENV)/.made: pyproject.toml constraints.txt
	$(call virtual,$(OLDEST_VENV))
	@sed -E -e 's/^(grpcio[a-z-]*)==.*/\1==1.71.2/' -e 's/^protobuf==.*/protobuf==5.29.*/' \
	  -e '/^googleapis/d' constraints.txt > $(OLDEST_VENV)/constraints.txt
	@$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -c $(OLDEST_VENV)/constraints.txt -e . pytest pytest-asyncio hypothesis grpcio-status
	@touch $@

$(NEXT_VENV)/.made: pyproject.toml constraints.txt
	$(call virtual,$(NEXT_VENV))
	@sed -E -e 's/^transformers==.*/transformers==5.24.0/' -e 's/^tokenizers==.*/tokenizers==0.23.3/' \
	  -e 's/^huggingface_hub==.*/huggingface_hub==2.4.0/' constraints.txt > $(NEXT_VENV)/constraints.txt
	@$(NEXT_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -c $(NEXT_VENV)/constraints.txt -e '.[vision]' pytest pytest-asyncio hypothesis grpcio-status
	@touch $@

$(RAY_VENV)/.made: pyproject.toml constraints.txt
	$(call virtual,$(RAY_VENV))
	@$(RAY_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
	  -e '.[ray]' pytest pytest-asyncio hypothesis grpcio-status
	@touch $@
