import re
from pathlib import Path

from setuptools import find_packages, setup

source = (Path(__file__).parent / "minorca" / "__init__.py").read_text()
version = re.findall(r'^__version__ = "(.+)"', source, re.M)[0]

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
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "jinja2",
        # older ones run scripts of a hub's repository
        "datasets>=4",
        # triton 3.6's interpreter fails with 2.4
        "numpy<2.4",
        "pydantic>=2",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "fastapi",
        "uvicorn",
        "prometheus-client",
    ],
    extras_require={
        "eval": ["lm_eval==0.4.13"],
        "test": [
            "basedpyright==1.40.2",
            "gguf",
            "httpx",
            "lm_eval==0.4.13",
            "mistral-common",
            "openai",
            "peft",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.6",
            "schemathesis",
            "torchao",
            "transformers",
            "trl==1.16.*",
        ],
    },
    entry_points={"console_scripts": ["minorca = minorca.__main__:main"]},
)
