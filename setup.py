"""Everything the package index and pip need to know; pyproject.toml holds the build system and the tools' settings."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

# Triton publishes wheels for these platforms alone. Elsewhere the PyTorch backend runs, and a Triton installed under
# another name (the ROCm, XPU and Windows builds of PyTorch bring their own) is used if it can be imported.
TRITON_PLATFORMS = "platform_system == 'Linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"

DEMO = ["transformers>=4.51", "matplotlib>=3.8", "tqdm>=4.66", "rich>=13"]  # 4.51: the first with Qwen3
TRL = ["trl>=1.16", "accelerate>=1.4"]
# NumPy: Triton's interpreter, in which the kernels are tested on a CPU, needs it.
PYTEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.5", "hypothesis>=6.100"]
BENCHMARKS = ["tabulate>=0.9", "scipy>=1.15", "pandas>=2.2"]
TEST = [*PYTEST, "numpy>=1.26", *DEMO, *TRL, "peft>=0.17", *BENCHMARKS]
LINT = ["ruff>=0.12"]

setup(
    name="drpo_kernels",
    version=runpy.run_path(str(ROOT / "drpo_kernels" / "version.py"))["__version__"],
    description="Fused Triton kernels from lm_head to loss for DRPO and the policy losses it is compared with",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["reinforcement learning", "LLM", "policy optimization", "DRPO", "GRPO", "Triton", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["drpo_kernels", "drpo_kernels.*"]),
    package_data={"drpo_kernels": ["py.typed"]},
    zip_safe=False,  # Triton reads the kernels' source from their files
    install_requires=["torch>=2.8", f"triton>=3.4; {TRITON_PLATFORMS}"],
    extras_require={"demo": DEMO, "trl": TRL, "test": TEST, "lint": LINT, "dev": [*TEST, *LINT]},
    entry_points={"verl.plugins": ["drpo_kernels = drpo_kernels.integrations.verl"]},  # verl imports it with itself
)
