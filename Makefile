# Thin by intent: what a target does is in scripts/.
.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-kvm test soak bench lint install deb deb-test rbd-test

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install the Debian packages that the demo and the tests need
	@scripts/setup.sh

build: ## Build the programs, optimised, into target/release
	cargo build --release --workspace --bins

demo: setup ## Boot a guest on a Kickless disk and load it (under 5 minutes)
	@scripts/demo.sh

demo-kvm: ## Boot 8 guests without an operating system on one daemon under KVM (seconds)
	@scripts/demo-kvm.sh

test: setup ## Every test tier; ends with one line of totals
	@scripts/test.sh

soak: ## Kills, migrations, upgrades, random sessions by count, wake-ups and randomised tests by time (CONTRIBUTING.md)
	@scripts/test.sh soak

bench: ## Rates and latencies of the engine on this machine
	@scripts/bench.sh

rbd-test: ## Images of a Ceph cluster of one node, which it starts (needs ceph-mon, ceph-osd, librbd-dev)
	@scripts/rbd-test.sh

lint: ## Formatting, clippy, dependency policy
	@scripts/lint.sh

install: ## What `make build` has built into DESTDIR (/), with units, manual pages and completions
	@scripts/install.sh "$(or $(DESTDIR),/)"

deb: ## The Debian package, into target/debian (needs cargo-deb)
	@scripts/deb.sh

deb-test: ## Install that package in a clean root, and remove it (needs root and mmdebstrap)
	@scripts/deb-test.sh
