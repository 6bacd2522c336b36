# Pollux. `make help` lists what there is.
#
# Everything a target needs is installed by `make deps`: Debian packages with
# apt-get when run by root, Go modules and tools by the go command itself.

GO      ?= go
DIR     ?= ./pollux-data
BIN     := bin/pollux

# The whole test run is bounded; a hanging test prints its goroutines and fails.
TEST_TIMEOUT ?= 12m
ROUNDS       ?= 300
KILLS        ?= 500
SEEDS        ?= 2000

# SEED=n repeats one run of the seeded tests.
ifneq ($(SEED),)
export POLLUX_SEED := $(SEED)
endif

.DEFAULT_GOAL := help
.PHONY: help build run test lint fmt deps demo bench plots planted cover soak clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/pollux
	$(GO) build -o $(BIN) ./cmd/pollux

run: build ## build, start the pair in the foreground on ./pollux-data, show how to attach
	$(BIN) up --dir $(DIR) --first-volume disk1=10GiB

# What takes longest comes first, so that no processor waits for it in the end.
LONGEST := ./internal/pool ./test/sim ./test/e2e ./internal/host ./test/campaign

# The same seed each time: what fails here was broken by a change. `make soak`
# draws new ones. The simulator runs once more without the race detector, with
# which nothing can be replayed, and so does the pool, of whose crashes few are
# played with it, and kills under disks, whose clients are too slow with it.
test: deps lint ## everything that must pass: lint, then all tests with the race detector
	POLLUX_SEED=$${POLLUX_SEED:-1} POLLUX_REQUIRE_CLIENTS=1 $(GO) test -race -timeout $(TEST_TIMEOUT) $(LONGEST) ./...
	POLLUX_SEED=$${POLLUX_SEED:-1} $(GO) test -timeout $(TEST_TIMEOUT) ./test/sim
	$(GO) test -timeout $(TEST_TIMEOUT) ./internal/pool
	POLLUX_SEED=$${POLLUX_SEED:-1} $(GO) test -timeout $(TEST_TIMEOUT) -run TestKills ./test/campaign

lint: ## gofmt, go vet, staticcheck
	@bad=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$bad" ]; then echo "not formatted (run make fmt):"; echo "$$bad"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags planted ./internal/planted ./internal/flashmap ./internal/pool ./internal/ring ./internal/export/ring ./internal/export/vhostuser ./test/sim
	$(GO) tool staticcheck ./...

fmt: ## format all Go files
	gofmt -w $$(git ls-files --cached --others --exclude-standard '*.go')

deps: ## install what tests, demo and benchmarks need; without root, say what is missing
	@scripts/deps
	@$(GO) mod download

demo: build deps ## import a real image, kill a guest in the middle, prove that nothing was lost
	$(GO) run ./test/demo -pollux $(BIN)

# Each row five times takes some 20 minutes, the pauses some 5 with each kind of
# pages; -timeout and -limit end what hangs. Numbers go to out/*.json.
bench: build deps ## measure against other NBD servers, the pause at a failover, and restarts; about half an hour
	$(GO) run ./bench/nbd -pollux $(BIN)
	$(GO) run ./bench/nbd -pollux $(BIN) -copies
	$(GO) run ./bench/mirror -pollux $(BIN)
	$(GO) run ./bench/failover -pollux $(BIN) -check=false -huge=false -rounds 30 -hangs 0 -qemu 0 -out out/failover-small.json
	$(GO) run ./bench/failover -pollux $(BIN)
	$(GO) run ./bench/restart -pollux $(BIN)
	$(GO) run ./bench/ring
	$(GO) run ./bench/uring
	$(GO) run ./bench/hpdi -pollux $(BIN)

plots: ## draw docs/*.svg from the numbers in out/ that benchmarks have left
	$(GO) run ./bench/plot

planted: ## give the program each planted fault in turn: the simulator must find them, or the package's own test what random runs meet too seldom
	$(GO) test -tags planted -count=1 -timeout 0 -v -run "TestPlanted|TestPlaces" ./internal/planted ./internal/flashmap ./internal/pool ./internal/ring ./internal/export/ring ./internal/export/vhostuser ./test/sim

cover: deps ## which statements tests reach (docs/coverage.md); fails when a block that nothing reaches has no reason
	@mkdir -p out/cover
	$(GO) run ./test/cover

soak: build deps ## random runs of the simulator on all cores (SEEDS=2000), chaos in regions, deaths of disks' servers and of both sides of rings, a Debian system imported under fire, 20 kills under the disks of a virtual machine, a campaign of faults (ROUNDS=300) and of 1000 kills under disks (KILLS=500 of each kind; SEED=n draws the same ones again), 50 upgrades under load
	$(GO) test -count=1 -timeout 0 -v -run TestRandom ./test/sim -seeds $(SEEDS) -workers $$(nproc) $(if $(SEED),-first $(SEED))
	POLLUX_SOAK=1 $(GO) test -count=1 -timeout 30m -v -run RegionChaos ./internal/pool
	$(GO) test -count=1 -timeout 30m -run TestCrash ./internal/export/vhostuser -crash-seeds 500
	POLLUX_SOAK=1 $(GO) test -count=1 -timeout 30m -v -run Kill ./hpdi/ring ./test/ring
	POLLUX_SOAK=1 $(GO) test -count=1 -timeout 30m -v -run 'Import|Machine' ./test/e2e
	$(GO) test -count=1 -timeout 0 -v ./test/campaign -rounds $(ROUNDS) -kills $(KILLS)
	$(GO) run ./bench/upgrade -pollux $(BIN) $(if $(SEED),-seed $(SEED))

clean: ## remove what build and tests leave; keeps ./pollux-data
	rm -rf bin out
