# Each target is enough on a fresh Debian or Ubuntu, as root or with sudo: Postgres and venv come from apt-get, everything
# from pip goes into .venv. `make demo` starts a cluster, `make test` runs all checks, `make drill` breaks a cluster.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
TEST_FOLDERS := $(sort $(dir $(wildcard tests/*/*.py)))
# Where `make demo DEMO_OPTIONS='--s3 ENDPOINT/BUCKET'` logs in.
S3_VARIABLES := AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY,AWS_SESSION_TOKEN,AWS_PROFILE,AWS_REGION,AWS_DEFAULT_REGION
MAJORS ?= 14 16 17 18

.DEFAULT_GOAL := help
.PHONY: help demo test lint unit exhaustive exhaustive-deep simulate simulate-long broken-rules test-majors test-recovery test-barman test-minio benchmark-archive drill drill-ci image test-image test-browser dashboard-pictures probe-latency kubernetes audit clean system monitoring-tools scrape-cost

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "targets: demo test lint simulate simulate-long exhaustive-deep broken-rules test-majors test-recovery test-barman test-minio benchmark-archive drill drill-ci image test-image test-browser dashboard-pictures probe-latency kubernetes audit clean"

system:
	@tests/install-system.sh "$(PYTHON)"

# Judges of metrics, alerts and dashboards: promtool, Prometheus, postgres_exporter.
monitoring-tools:
	@tests/install-system.sh "$(PYTHON)" monitoring

$(VENV)/.made: pyproject.toml constraints.txt | system
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[certificates]'
	@touch $@

$(VENV)/.made-for-tests: $(VENV)/.made
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: system $(VENV)/.made
	@$(if $(SUDO),$(SUDO) --preserve-env=$(S3_VARIABLES)) $(RUN) instance_manager demo $(DEMO_OPTIONS)

lint: $(VENV)/.made-for-tests
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	# By folders: each has its own conftest and helpers, imported by their bare names as pytest does.
	@printf '%s\n' $(TEST_FOLDERS) | xargs -t -P 2 -n 1 $(RUN) mypy
	$(VENV)/bin/lint-imports

unit: system monitoring-tools $(VENV)/.made-for-tests
	@tests/install-system.sh "$(PYTHON)" test
	# Twice as many processes as CI has cores: all but the simulation's, which come first, wait more than they work.
	$(RUN) pytest -n 4 --dist worksteal $(PYTEST_OPTIONS) tests/simulation tests/core tests/agent tests/unit tests/coordination tests/http tests/drill tests/deploy tests/postgres tests/archive tests/metrics tests/benchmarks
	# By files, each with a cluster of its own.
	$(RUN) pytest -n 4 --dist loadfile $(PYTEST_OPTIONS) --ignore=tests/cluster/test_cluster_recovery.py tests/supervisor tests/cluster

# What a scrape of 50 databases and 1,000 tables costs.
scrape-cost: system $(VENV)/.made-for-tests
	$(RUN) pytest -s $(PYTEST_OPTIONS) tests/metrics/scrape_cost.py

# The exhaustive check of the protocol, every interleaving; and that each broken rule is caught.
exhaustive: $(VENV)/.made-for-tests
	$(RUN) pytest -n 2 $(PYTEST_OPTIONS) tests/exhaustive

exhaustive-deep: $(VENV)/.made-for-tests
	$(VENV)/bin/python tests/exhaustive/check.py --setting deep

# The real agents on virtual time: `make simulate SEEDS=2000`, or MINUTES=3, or SEED=17 to see one again.
simulate: $(VENV)/.made-for-tests
	$(VENV)/bin/python tests/simulation/simulate.py $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(SIMULATE_OPTIONS)

simulate-long: SEEDS := 20000
simulate-long: SIMULATE_OPTIONS := --from 1000000 --all-branches
simulate-long: simulate

broken-rules: $(VENV)/.made-for-tests
	$(VENV)/bin/python tests/simulation/check_broken_rules.py

test: lint unit exhaustive
	$(MAKE) simulate SEEDS=1200 MINUTES=3

test-majors: system $(VENV)/.made-for-tests
	@tests/install-system.sh "$(PYTHON)" majors
	tests/majors.sh $(MAJORS)

# A second cluster from the archive of a first one.
test-recovery: system $(VENV)/.made-for-tests
	$(RUN) pytest $(PYTEST_OPTIONS) tests/cluster/test_cluster_recovery.py

# Base backups in every compression, theirs restored by us and ours by them.
test-barman: system $(VENV)/.made-for-tests
	BARMAN_EVERY=1 $(RUN) pytest -n 2 $(PYTEST_OPTIONS) tests/archive/test_backup_with_barman.py tests/archive/test_with_barman.py

# Every store's tests over MinIO, a real S3 server that is killed and started again; the first time it is built, with Go, in ten minutes.
test-minio: system $(VENV)/.made-for-tests
	$(VENV)/bin/python tests/programs/minio_program.py
	ARCHIVE_STORES=minio $(RUN) pytest -n 2 $(PYTEST_OPTIONS) -k minio -o python_files='test_*.py with_minio.py' tests/archive

# Archiving and replay beside pgBackRest and barman-cloud (docs/benchmarks.md); the first time WAL is made, 2 GB in /tmp.
benchmark-archive: system $(VENV)/.made-for-tests
	@tests/install-system.sh "$(PYTHON)" benchmark
	$(VENV)/bin/python tests/benchmarks/archive_benchmark.py $(BENCHMARK_OPTIONS)
	$(VENV)/bin/python tests/benchmarks/backlog_benchmark.py
	$(VENV)/bin/python tests/benchmarks/lease_benchmark.py

drill: $(VENV)/.made
	@tests/install-system.sh "$(PYTHON)" drill
	$(SUDO) $(RUN) instance_manager drill $(DRILL_OPTIONS)

# What no test of tests/cluster does as hard; `make drill` runs every case.
DRILL_CI_CASES := switchover kill-all stop-supervisor-and-agent cut-primary both-standbys disk-stall standby-destroyed random
drill-ci: DRILL_OPTIONS := --quick --seconds 60 --keep .cache/drill $(DRILL_CI_CASES:%=--case %)
drill-ci: drill

# The status page in a real browser, Debian's chromium; with SCREENSHOTS=docs/images its pictures are made anew.
test-browser: system $(VENV)/.made-for-tests
	@tests/install-system.sh "$(PYTHON)" browser
	$(RUN) pytest $(PYTEST_OPTIONS) tests/browser

# Every panel of the dashboard, drawn from a real cluster under load, into docs/images (PICTURES=DIRECTORY: there); five minutes.
PICTURES ?= docs/images
dashboard-pictures: system monitoring-tools $(VENV)/.made-for-tests
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pictures]'
	$(VENV)/bin/python tests/metrics/dashboard_pictures.py --to $(PICTURES)

# How soon the probes answer at 200 requests a second, under load and with Postgres, disk and store away; needs root.
probe-latency: system $(VENV)/.made-for-tests
	$(SUDO) $(VENV)/bin/python tests/benchmarks/probe_latency.py

# The container image: `make image PG_MAJOR=16 IMAGE=registry.example/postgres:16`; image/README.md has every variable.
image:
	image/build.sh

test-image: image $(VENV)/.made-for-tests
	$(RUN) pytest $(PYTEST_OPTIONS) tests/image

# The manifests of deploy/ on a real API server, their pods as processes in namespaces. The first time programs are downloaded or built.
kubernetes: system $(VENV)/.made-for-tests
	@tests/install-system.sh "$(PYTHON)" drill
	$(VENV)/bin/python tests/kubernetes/kube_binaries.py
	$(SUDO) env XDG_CACHE_HOME="$${XDG_CACHE_HOME:-$$HOME/.cache}" CI="$$CI" KUBERNETES_TESTS="$$KUBERNETES_TESTS" \
		$(RUN) pytest $(PYTEST_OPTIONS) tests/kubernetes

# Known holes in the pinned packages, which needs an advisory source and fails without one; and build/sbom.cdx.json (CycloneDX).
# In an environment of its own: the tools' dependencies are none of ours.
audit: system
	@[ -x .cache/audit/bin/python ] || $(PYTHON) -m venv .cache/audit
	@.cache/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0
	.cache/audit/bin/python tests/audit.py

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
