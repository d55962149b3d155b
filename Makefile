# One command for each thing one does with this repository; `make help` lists them.

VENV ?= .venv
PYTHON_IN_VENV := $(abspath $(VENV))/bin/python
# Real LMCache, for the tests that speak to it: on top of the environment above.
# Its name does not begin with LMCACHE_: the programs read such variables as settings.
PD_TEST_LMCACHE_VENV ?= .venv-lmcache
export PD_TEST_LMCACHE_VENV := $(abspath $(PD_TEST_LMCACHE_VENV))
CARGO ?= cargo
# Bindgen needs libclang, which the environment has.
BINDINGS = LIBCLANG_PATH=$$($(PYTHON_IN_VENV) -c 'import clang; print(clang.__path__[0])')/native \
	$(CARGO) test --locked -p nixl-sys --test bindings
# `make demo KEEP=1` leaves everything running; any other value than 1 is ignored.
KEEP ?=
# Further arguments for pytest: make e2e PYTEST="-k first -x"
PYTEST ?=
FUZZ_SECONDS ?= 60
# Python of a GPU host, with torch and vLLM for CUDA; a bundle's env.sh names it.
GPU_PYTHON ?= $(PYTHON_IN_VENV)
# Further arguments of tests/gpu/bench.py and scripts/gpu_bundle.py.
GPU ?=
# Which benchmarks: any of pushes, handshakes, engines, ways, proxies, crowd; all by default.
BENCH ?=
# For the tests of the shared registry; any etcd since 3.4 will do.
ETCD ?= target/etcd/usr/bin/etcd
# For the tests of discovery by way of Mooncake's metadata server.
REDIS ?= target/redis/redis-server

.DEFAULT_GOAL := help
# Most targets of `make test` would take the cores from each other.
.NOTPARALLEL:
.PHONY: help venv venv-lmcache build demo test prepare unit e2e no-push lint bench gpu-test gpu-bench gpu-bundle fuzz etcd bindings clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## Make the Python environment with vLLM (CPU) and NIXL, once
	@mkdir -p target
	@scripts/venv.sh "$(VENV)"

venv-lmcache: venv ## Make the environment with real LMCache, once
	@scripts/venv-lmcache.sh "$(PD_TEST_LMCACHE_VENV)" "$(VENV)"

build: ## Build the release binaries: sidecar and pd-proxy
	$(CARGO) build --release --locked --bins

demo: venv build ## Two real vLLM, two sidecars, one proxy: prompts, texts, figures (KEEP=1 leaves it running)
	@$(PYTHON_IN_VENV) scripts/demo.py $(if $(filter 1,$(KEEP)),--keep)

test: prepare lint unit e2e ## Everything: lint, unit tests, real engines over real NIXL

# One fetches and unpacks, the other computes.
prepare: ## What the tests need: the environments, made while the release binaries are built
	@$(MAKE) --no-print-directory venv-lmcache & environments=$$!; \
	$(CARGO) build --release --locked --bins; built=$$?; \
	wait $$environments && exit $$built

unit: venv ## Tests without engines: Rust (with the environment's NIXL) and Python
	@test -x $(ETCD) || scripts/etcd.sh target/etcd || echo "note: no etcd: tests of the shared registry are skipped"
	@test -x $(REDIS) || scripts/redis.sh target/redis || echo "note: no Redis: tests of discovery through it are skipped"
	PD_TEST_ETCD=$$(test -x $(ETCD) && echo $(abspath $(ETCD))) PD_TEST_REDIS=$$(test -x $(REDIS) && echo $(abspath $(REDIS))) \
		VIRTUAL_ENV=$(abspath $(VENV)) PD_REQUIRE_NIXL=1 \
		$(CARGO) test --workspace --locked
	cd python && $(PYTHON_IN_VENV) -m pytest -q $(PYTEST)

e2e: venv venv-lmcache build ## Tests with real vLLM, real NIXL and real LMCache
	$(PYTHON_IN_VENV) -m pytest tests $(PYTEST)

no-push: venv venv-lmcache build ## The tests with engines while nothing is pushed: succeeds if they fail
	! PD_TEST_NO_PUSH=1 $(PYTHON_IN_VENV) -m pytest tests -x $(PYTEST)

lint: venv ## Formatting, clippy, ruff, mypy, generated bindings, tidiness
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(PYTHON_IN_VENV) protocol/fixtures/generate.py --check
	$(PYTHON_IN_VENV) -m ruff check python tests scripts protocol/fixtures
	$(PYTHON_IN_VENV) -m ruff format --check python tests scripts protocol/fixtures
	$(PYTHON_IN_VENV) -m mypy
	cd python && $(PYTHON_IN_VENV) -m mypy
	$(BINDINGS)
	$(PYTHON_IN_VENV) scripts/tidy.py

bench: venv ## Ours against its baselines, alternating; writes target/bench.json and target/bench.md
	$(CARGO) build --release --locked --bins --examples
	$(PYTHON_IN_VENV) tests/bench/run.py $(BENCH)

gpu-test: ## Tests that need a GPU, PyTorch and vLLM for CUDA, and no network; skipped loudly elsewhere
	$(GPU_PYTHON) -m pytest tests/gpu -v -s $(PYTEST)

gpu-bench: ## The hand-over between two GPUs against its baselines; writes target/gpu-bench/gpu-bench.{json,md}
	$(GPU_PYTHON) tests/gpu/bench.py $(GPU) || test $$? -eq 77

gpu-bundle: build ## What a GPU host without a network needs for both, into target/gpu-bundle
	$(PYTHON_IN_VENV) scripts/gpu_bundle.py target/gpu-bundle $(GPU)

fuzz: ## Fuzz every decoder for FUZZ_SECONDS each (needs a C++ compiler)
	@scripts/fuzz.sh $(FUZZ_SECONDS)

etcd: ## Fetch etcd for the tests of the proxy (Debian's package, unpacked below target)
	@test -x $(ETCD) || scripts/etcd.sh target/etcd

bindings: venv ## Generate the bindings of NIXL's C API again
	PD_WRITE_BINDINGS=1 $(BINDINGS)

clean: ## Remove what was built, and the Python environment
	$(CARGO) clean
	rm -rf "$(VENV)" "$(PD_TEST_LMCACHE_VENV)" .cache .pytest_cache .ruff_cache .mypy_cache
