# Every target says what it does, may be run twice, and starts from a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OLDEST_ORT := 1.20.0
SUDO   := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
SOURCES := $(shell find fleetune/ device_runtime broker exporters toolkit -name '*.py')
export PATH := $(PATH):/usr/sbin

# $(call install,ENVIRONMENT,WHAT): pip, with a line for each package that it fetches; its errors and its exit status are its own.
install = { $(1)/bin/pip install --progress-bar off --disable-pip-version-check $(2); echo $$? >$(1)/pip.status; } \
    | awk '/^Collecting / { print "  " $$2; fflush() } /^Installing collected/ { print "  unpacking"; fflush() }'; \
    read status <$(1)/pip.status; rm $(1)/pip.status; [ $$status = 0 ]

.PHONY: help demo test test-all test-faults test-arm node-packages web test-web apk check bench device-env oldest-env ort-env arm-env device-lock sbom mosquitto clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        all of fleetune on this machine, a few minutes"
	@echo "make test        the tests, without the slow ones"
	@echo "make test-faults kills, bad links and damaged files, about two hours; FLEETUNE_KILLS and FLEETUNE_MUTATIONS make it shorter"
	@echo "make test-all    every test but those"
	@echo "make test-arm    the aarch64 wheels in an emulator, against this machine"
	@echo "make web         the page that fleetune web serves: toolkit/page; needs node (WEBGPU=1: with WebGPU, 27 MB more)"
	@echo "make test-web    all tests of the page; the walk through it where chromium is"
	@echo "make apk         the page as an Android app, with ARTIFACT in it: android_demo/build/fleetune-demo.apk"
	@echo "make check       ruff, mypy and import-linter"
	@echo "make bench       the figures of benchmarks/"
	@echo "make device-env  $(VENV)-device: what a device has, without torch"
	@echo "make oldest-env  $(VENV)-oldest: the same with the oldest onnxruntime that graphs are promised to open in"
	@echo "make ort-env     $(VENV)-ort: ONNX Runtime Training, which shadows onnxruntime"
	@echo "make arm-env     $(VENV)-arm: an emulator, and the same for aarch64"
	@echo "make device-lock requirements-device.txt anew: what a device installs, by version and digest"
	@echo "make sbom        dist/fleetune-device.cdx.json: what $(VENV)-device holds, as CycloneDX"
	@echo "make clean       remove environments and caches"

demo: $(VENV)/demo.stamp
	$(BIN)/fleetune demo

test: $(VENV)/dev.stamp mosquitto node-packages
	$(BIN)/pytest -m "not slow and not faults" -n logical --dist loadfile

test-all: $(VENV)/dev.stamp $(VENV)-device/device.stamp $(VENV)-oldest/oldest.stamp ort-env mosquitto
	$(BIN)/pytest -m "not faults"

test-faults: $(VENV)/dev.stamp mosquitto
	$(BIN)/pytest -rs -s -m "faults or slow" tests/faults tests/test_plain_words.py tests/device_runtime/contracts/test_mutated_payloads.py
	$(BIN)/pytest -rs tests/faults tests/broker/test_federation.py tests/broker/test_many_agents.py tests/device_runtime/test_damage.py tests/broker/test_retention.py -m "not faults"

test-arm: $(VENV)/dev.stamp $(VENV)-arm/arm.stamp mosquitto
	$(BIN)/pytest -rs tests/test_arm.py

# The tests of the page's engine skip, and say so, where Node or its packages cannot be had.
node-packages:
	@if [ -e web_demo/node_modules/.package-lock.json ] && [ ! web_demo/package-lock.json -nt web_demo/node_modules/.package-lock.json ]; then :; \
	elif command -v npm >/dev/null; then \
	    echo "installing the packages of the page, for its tests, into web_demo/node_modules"; \
	    npm ci --prefix web_demo --no-audit --no-fund --loglevel=error >/dev/null 2>&1 \
	    || { echo "the page's packages could not be installed: its tests will be skipped"; rm -rf web_demo/node_modules; }; fi

web: web_demo/node_modules/.package-lock.json
	npm run --prefix web_demo build -- $(if $(WEBGPU),--webgpu)

test-web: WEBGPU = 1
test-web: $(VENV)/dev.stamp web mosquitto
	$(BIN)/pytest -rs tests/web tests/test_golden_draws.py

apk: web
	@command -v zipalign >/dev/null || { echo "installing what builds an Android app"; \
	    $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends aapt zipalign apksigner android-framework-res default-jdk-headless; }
	$(PYTHON) android_demo/build.py $(ARTIFACT)

web_demo/node_modules/.package-lock.json: web_demo/package-lock.json
	npm ci --prefix web_demo --no-audit --no-fund

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev.stamp
	@for figure in $(basename $(notdir $(wildcard benchmarks/[a-z]*.py))); do \
	    echo "== benchmark $$figure"; $(BIN)/fleetune bench $$figure || exit 1; done

device-env: $(VENV)-device/device.stamp

oldest-env: $(VENV)-oldest/oldest.stamp

arm-env: $(VENV)-arm/arm.stamp

# Its last release has no wheels for ARM Linux nor for Python 3.13; there the tests that need it skip, and say so.
ort-env: | $(VENV)-ort/bin/pip
	@if [ ! -e $(VENV)-ort/ort.stamp ] || [ pyproject.toml -nt $(VENV)-ort/ort.stamp ]; then \
	    echo "installing ONNX Runtime Training into $(VENV)-ort"; \
	    if $(call install,$(VENV)-ort,-e . tokenizers torch==2.13.0 onnxruntime-training-cpu==1.19.2 "onnx<1.18" "numpy<2.3"); \
	    then touch $(VENV)-ort/ort.stamp; \
	    else echo "ONNX Runtime Training could not be installed: the tests that need it will be skipped"; rm -rf $(VENV)-ort; fi; fi

# The tests that need a real MQTT server skip, and say so, where Mosquitto cannot be installed.
mosquitto:
	@if command -v mosquitto >/dev/null; then :; \
	elif command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || [ -n "$(SUDO)" ]; }; then \
	    echo "installing Mosquitto, the MQTT server that the tests use"; \
	    { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends mosquitto; } >/dev/null 2>&1 \
	    || echo "Mosquitto could not be installed: the tests that need it will be skipped"; \
	else echo "no Mosquitto, and no right to install it: the tests that need it will be skipped"; fi

$(VENV)/demo.stamp $(VENV)/dev.stamp: $(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/pip
	@echo "installing fleetune[$*] into $(VENV) (torch included: this takes a while the first time)"
	@$(call install,$(VENV),-e ".[$*]")
	@touch $@

device-lock: $(VENV)-supply/supply.stamp
	$(VENV)-supply/bin/uv pip compile --quiet --universal --python-version 3.10 --extra device --extra trust --generate-hashes --no-annotate \
	    --no-header --no-emit-index-url --upgrade --output-file requirements-device.txt pyproject.toml

sbom: $(VENV)-supply/supply.stamp $(VENV)-device/device.stamp
	@mkdir -p dist
	$(VENV)-supply/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file dist/fleetune-device.cdx.json $(VENV)-device

$(VENV)-supply/supply.stamp: | $(VENV)-supply/bin/pip
	@echo "installing uv and cyclonedx-bom into $(VENV)-supply"
	@$(call install,$(VENV)-supply,"uv>=0.9" "cyclonedx-bom>=7")
	@touch $@

$(VENV)-device/device.stamp: pyproject.toml requirements-device.txt $(SOURCES) | $(VENV)-device/bin/pip
	@echo "installing fleetune[device,trust] into $(VENV)-device, each package by its digest, without torch"
	@$(call install,$(VENV)-device,--require-hashes -r requirements-device.txt)
	@$(call install,$(VENV)-device,--no-deps .)
	@rm -rf build
	@if $(VENV)-device/bin/python -c "import torch" 2>/dev/null; then echo "torch came along: wrong"; exit 1; fi
	@touch $@

$(VENV)-oldest/oldest.stamp: pyproject.toml $(SOURCES) | $(VENV)-oldest/bin/pip
	@echo "installing fleetune[device] with onnxruntime $(OLDEST_ORT) into $(VENV)-oldest"
	@$(call install,$(VENV)-oldest,".[device]" onnxruntime==$(OLDEST_ORT))
	@rm -rf build
	@touch $@

# Where it cannot be made the script says why, and makes no stamp: the tests that need it skip.
$(VENV)-arm/arm.stamp: pyproject.toml tests/support/make_arm_root.sh $(SOURCES) | $(BIN)/pip
	@sh tests/support/make_arm_root.sh $(BIN)/pip $(VENV)-arm

%/bin/pip:
	@echo "creating $*"
	@$(PYTHON) -m venv $* || { rm -rf $*; \
	    echo "no venv module: run  apt-get install python3-venv  (or set PYTHON to another Python, 3.10 or later)"; exit 1; }

clean:
	rm -rf $(VENV) $(VENV)-device $(VENV)-oldest $(VENV)-ort $(VENV)-arm $(VENV)-supply build dist *.egg-info demo-run .pytest_cache .ruff_cache .mypy_cache .hypothesis \
	    .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
