# The interface: each target is one line that hands over to the program that does the work.
# The text behind `##` is what `make help` shows; `##@` begins a group.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
COMPONENT ?=
VERSION ?=
RELAY := .venv/bin/torchrelay
COMPONENT_FLAG = $(if $(COMPONENT),--component '$(COMPONENT)')

##@ Start here
.PHONY: help setup doctor
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/run.stamp ## Make .venv from the pinned lock; nothing to do when it is up to date

doctor: .venv/run.stamp ## Look for what would make a later step fail, with a remedy for each finding
	$(RELAY) doctor

##@ Development perimeter
.PHONY: deploy-dev plan status up down gc clean
deploy-dev: .venv/run.stamp ## From the dataset to a served prediction [COMPONENT=…]
	$(RELAY) deploy-dev $(COMPONENT_FLAG)

plan: .venv/run.stamp ## Say what deploy-dev would run and change; touches nothing [COMPONENT=…]
	$(RELAY) plan $(COMPONENT_FLAG)

status: .venv/run.stamp ## Say what should run, and what really answers
	$(RELAY) status

up: .venv/run.stamp ## Start the tracking server and the perimeter, with the versions that served last
	$(RELAY) up

down: .venv/run.stamp ## Stop every process that was started here; keeps all data
	$(RELAY) down

gc: .venv/run.stamp ## Say what may be deleted to free disk space, and why the rest stays; then do it [CONFIRM=yes]
	$(RELAY) gc $(if $(CONFIRM),--confirm '$(CONFIRM)')

clean: .venv/run.stamp ## Stop everything and remove what was made here [CONFIRM=yes]
	$(RELAY) clean $(if $(CONFIRM),--confirm '$(CONFIRM)')

##@ Production
.PHONY: promote rollback history why rotate-keys
promote: .venv/run.stamp ## Ask for a version in production and follow its roll-out [COMPONENT=… VERSION=…]
	$(RELAY) promote $(COMPONENT_FLAG) $(if $(VERSION),--version '$(VERSION)')

rollback: .venv/run.stamp ## Go back to what served healthy before, in seconds [COMPONENT=… TO=…]
	$(RELAY) rollback $(COMPONENT_FLAG) $(if $(TO),--to '$(TO)')

history: .venv/run.stamp ## Show the ledger: roll-outs, refusals, rollbacks [PERIMETER=dev]
	$(RELAY) history $(if $(PERIMETER),--perimeter '$(PERIMETER)')

why: .venv/run.stamp ## Walk from an answer back to archive, run, data and commit [ID=x-request-id]
	$(RELAY) why $(if $(ID),--id '$(ID)')

rotate-keys: .venv/run.stamp ## Give a perimeter a new webhook secret and signing key, while it serves [PERIMETER=production]
	$(RELAY) rotate-keys $(if $(PERIMETER),--perimeter '$(PERIMETER)')

##@ Machines at Google
.PHONY: plan-provision provision tear-down verify-gcp
PERIMETER_FLAG = $(if $(PERIMETER),--perimeter '$(PERIMETER)')
YES_FLAGS = $(if $(CONFIRM),--confirm '$(CONFIRM)') $(if $(PRODUCTION),--production '$(PRODUCTION)')
plan-provision: .venv/run.stamp ## Say what provision would create, change or destroy, and its costs [PERIMETER=dev|prod]
	$(RELAY) plan-provision $(PERIMETER_FLAG)

provision: .venv/run.stamp ## Make a perimeter's network, bucket, accounts and machines [PERIMETER=dev|prod]
	$(RELAY) provision $(PERIMETER_FLAG) $(YES_FLAGS)

tear-down: .venv/run.stamp ## Take all of that away [PERIMETER=dev CONFIRM=dev; production: PRODUCTION=yes]
	$(RELAY) tear-down $(PERIMETER_FLAG) $(YES_FLAGS)

verify-gcp: .venv/run.stamp ## Ask Google whether the perimeter is what it should be [PERIMETER=dev|prod]
	$(RELAY) verify-gcp $(PERIMETER_FLAG)

##@ Backups
.PHONY: backup-status restore recovery-key
backup-status: .venv/run.stamp ## Say what of registry, artifacts and keys is in the backup, and how old that is
	$(RELAY) backup-status

restore: .venv/run.stamp ## Bring all of it back, in one command [CONFIRM=yes AT=time REGISTRY=name IDENTITY=file]
	$(RELAY) restore $(if $(CONFIRM),--confirm '$(CONFIRM)') $(if $(AT),--at '$(AT)') $(if $(REGISTRY),--registry '$(REGISTRY)') $(if $(IDENTITY),--identity '$(IDENTITY)')

recovery-key: .venv/run.stamp ## Make the key that the backup of private keys is encrypted for [FILE=…]
	$(RELAY) recovery-key $(if $(FILE),--file '$(FILE)')

##@ Components
.PHONY: new-component environment
new-component: .venv/run.stamp ## Lay out components/NAME, which passes its tests at once [NAME=…]
	$(RELAY) new-component $(if $(NAME),--name '$(NAME)')

environment: .venv/run.stamp ## Build the environment that a component trains and serves in [COMPONENT=…]
	$(RELAY) build-environment $(COMPONENT_FLAG) --log logs/build_environment.log

##@ Work on Torchrelay itself
.PHONY: test test-faults check lock schema bench bench-rollout
test: .venv/dev.stamp environment ## Run the tests; real servers, on this machine only [TESTS=tests/unit]
	.venv/bin/pytest $(TESTS)

test-faults: .venv/dev.stamp environment ## Run every fault, every bad model: about half an hour [TESTS=tests/provision]
	.venv/bin/pytest $(or $(TESTS),tests/faults tests/provision) -m ''

check: .venv/dev.stamp requirements/node_modules/.package-lock.json ## Run every linter that CI runs
	.venv/bin/python .ci/check.py

bench: .venv/run.stamp environment ## Measure against peers, see docs/performance.md [BENCH=serving|redeploy|memory|pipeline|fresh|cli|canary|predictions|rollout|recovery|backup]
	.venv/bin/python bench/$(or $(BENCH),serving)/run $(ARGS)

bench-rollout: .venv/run.stamp environment ## Measure roll-outs under load, recovery from faults, bad and good models: an hour
	.venv/bin/python bench/rollout/run $(ARGS) && .venv/bin/python bench/recovery/run

lock: .venv/dev.stamp ## Write all locks anew from their .in files [UPGRADE=yes]
	requirements/lock $(if $(UPGRADE),--upgrade)

schema: .venv/run.stamp ## Write config/schema.json anew from the models of src/torchrelay/config.py
	$(RELAY) describe-config --schema > config/schema.json

# A stamp is the last thing that install writes, so an interrupted setup is taken up again.
.venv/run.stamp .venv/dev.stamp: .venv/%.stamp: requirements/%.lock pyproject.toml requirements/install .venv/bin/python $(wildcard .venv/unfinished)
	$(PYTHON) requirements/install --project --venv .venv --lock $<

# Missing, or a link to a Python that has gone since: install sees to either.
.venv/bin/python: ;

# npm writes this file last.
requirements/node_modules/.package-lock.json: requirements/package-lock.json
	npm ci --prefix requirements --ignore-scripts --no-audit --no-fund
