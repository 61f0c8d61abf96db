# Every command makes or brings up to date .venv first (shared/install.py; under half a second when nothing is to do).
# ARGS goes to the command behind a target: `make test ARGS="tests/shared -k cancel"`, `make demo ARGS=--help`.

.DEFAULT_GOAL := help
.PHONY: help demo up test lint bench images chaos fuzz samples
# Two installs into one .venv at once would spoil it.
.NOTPARALLEL:

PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.11 python,$(shell command -v $(name) 2>/dev/null)))
BIN := .venv/bin
INSTALL = @if [ -z "$(PYTHON)" ]; then echo "Enlarger needs Python 3.11 or 3.12, and no Python was found on PATH."; exit 1; fi; \
	"$(PYTHON)" -I shared/install.py

help: ## Say what there is (this list).
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Enlarge a real photograph through the whole service, print what happened, save it under demo-output/.
	$(INSTALL) api worker stack
	$(BIN)/enlarger demo $(ARGS)

up: ## Run the whole service on this machine until ^C; prints the address, a key and a sign-in link (PORT=8000 to choose).
	$(INSTALL) api worker stack
	$(BIN)/enlarger up $(if $(PORT),--port $(PORT)) $(ARGS)

# Two at a time: half of a test is waiting. `make test ARGS=-n0` runs them one by one, in this process.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder
# Complete means every line and branch (pyproject.toml says of what). Asked for of whole runs only.
test: ## Run every test, and fail where jobs, tiling or upscale are not covered completely.
	$(INSTALL) api worker stack traces test lint
	$(if $(ARGS),,$(BIN)/python -m pytest $(BESIDE) -m covering --cov --cov-report=)
	$(if $(ARGS),,$(BIN)/python -m coverage report --fail-under=100)
	$(BIN)/python -m pytest $(BESIDE) $(or $(ARGS),-m "not covering")

lint: ## Check style (ruff), types (mypy) and who imports whom (import-linter).
	$(INSTALL) api worker stack traces test lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

samples: ## Make the crops that the page shows beside each model anew (commit them).
	$(INSTALL) api worker
	$(BIN)/python -m worker.samples

fuzz: ## Hand 5,000 broken and hostile pictures to the real API and workers (MUTANTS=5000 SEED=1 to choose).
	$(INSTALL) api worker stack test lint
	FUZZ_MUTANTS=$(or $(MUTANTS),5000) FUZZ_SEED=$(or $(SEED),1) $(BIN)/python -m pytest -s --timeout 3600 tests/journeys/test_bad_input.py $(ARGS)

bench: ## Measure speed and memory on this machine, the network beside other runtimes; JSON and a chart in bench-output/.
	$(INSTALL) api worker stack test bench
	$(BIN)/python -m tests.benchmarks $(ARGS)

images: ## Build both container images with buildah and run docker-compose.yml from them, without Docker (root, Debian).
	$(INSTALL) api worker stack test
	$(BIN)/python -m tests.images.try_images $(ARGS)

chaos: ## Break a whole service in every way for a quarter of an hour, and print what it kept of its promises.
	$(INSTALL) api worker stack test
	$(BIN)/python -m tests.chaos $(ARGS)
