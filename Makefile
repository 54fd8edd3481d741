# All commands make .venv on first use.
PYTHON ?= python3
CXX ?= g++
BIN := .venv/bin

.PHONY: demo test test-oldest lint sanitize kernels wheels

demo: .venv/installed
	$(BIN)/paroattn demo

# One worker per core, with one thread each. A module's tests stay together, since they share fixtures.
test: lint
	$(BIN)/pytest -n auto --dist loadscope
	for host in comfyui sglang vllm_omni; do $(BIN)/pytest -n auto integrations/$$host/tests || exit 1; done

# What concerns diffusers, with the oldest version that is supported.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto --dist loadscope -k "not compil" -m "not family" \
		tests/test_apply.py tests/test_models.py \
		tests/test_schedule.py tests/test_requests.py tests/test_memory.py
	.venv-oldest/bin/python -m pytest -n auto -k "taking_over or all_blocks" -m family tests/test_models.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernels' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer. -S keeps the editable install out
# of the way: the modules come from PYTHONPATH.
sanitize: .venv/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/sanitized -C cmake.define.PAROATTN_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH="build/sanitized:$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" \
	$(BIN)/python -S -m pytest -s -k "not memory and not compiled_part" tests/test_cpu.py

# Every Triton kernel in every variant for every target, ahead of time; `make test` compiles the common ones.
kernels: .venv/installed
	$(BIN)/python lab/benchmarks/triton_kernels.py --all

# All distributions, checked, and installed into fresh environments.
wheels: dist/built
	$(BIN)/python .ci/check_wheels.py

dist/built: .venv/installed $(wildcard csrc/*) \
		$(shell find src lab/paroattn_lab lab/models integrations/*/src -name '*.py' -o -name '*.cu')
	rm -rf dist && mkdir -p dist build
	for project in . lab lab/models integrations/sglang integrations/vllm_omni; do $(BIN)/python -m build --outdir dist $$project >build/dist.log || exit 1; done
	touch $@

# torch comes first and by its exact version: left to the resolver, it would be a build with CUDA.
.venv/installed: pyproject.toml lab/pyproject.toml lab/models/pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli,dev]' --editable lab/models \
		--editable 'lab[training]'
	touch $@

.venv-oldest/installed: constraints-oldest.txt dist/built
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	sed -n 's/^\([^#=]*==\).*/^\1/p' constraints-oldest.txt | grep -vf - constraints.txt > .venv-oldest/constraints.txt
	cat constraints-oldest.txt >> .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --constraint .venv-oldest/constraints.txt --find-links dist 'paroattn[cli]' \
		pytest pytest-xdist hypothesis peft
	touch $@
