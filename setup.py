import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).parent / "lag_megatron" / "__init__.py"

setup(
    name="lag_megatron",
    version=re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1],
    description="Landscape-aware growing of transformers on DeepSpeed and Megatron-Core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["lag_megatron", "lag_megatron.*"]),
    package_data={
        "lag_megatron": [
            "evaluation/tasks/*.yaml",
            "kernels/cuda/*.cu",
            "kernels/cpu/*.cpp",
            "kernels/cpu/*.h",
        ]
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19,<0.20",
        "megatron-core>=0.16,<0.20",
        "transformers>=5,<6",
        "tokenizers>=0.22,<1",
        "wandb>=0.31,<1",
        "numpy>=1.26,<3",
        "scipy>=1.15,<2",
        "pydantic>=2.10,<3",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "xxhash>=3.4,<5",
        "tqdm>=4.66,<5",
        "ninja>=1.11,<2",
    ],
    extras_require={
        "data": ["pyarrow>=19,<27"],
        "plot": ["matplotlib>=3.9,<4"],
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate>=1,<2"],
        "dev": [
            "pytest>=9,<10",
            "pytest-timeout>=2.3,<3",
            # For its interpreter: torch's CPU builds come without it.
            "triton>=3.6,<4; platform_system == 'Linux'",
            "psutil>=5.9,<8",
            "hypothesis>=6.100,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2,<3",
            "types-PyYAML>=6",
        ],
    },
)
