import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INIT = ROOT / "lag_megatron" / "__init__.py"
# Commands with the modules of ``lag_megatron.cli`` that they start.
COMMANDS = {
    "lag-train": "train",
    "lag-grow": "grow_checkpoint",
    "lag-respread": "respread_checkpoint",
    "lag-convert": "convert_checkpoint",
    "lag-inspect": "inspect_checkpoint",
    "lag-report": "report",
    "lag-evaluate": "evaluate",
    "lag-prepare-data": "prepare_data",
    "lag-plan-stages": "plan_stages",
    "lag-compare-policies": "compare_policies",
}


class BuildWithConfigs(build_py):
    """Put ``configs`` into the package of a wheel; a checkout's are read where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "lag_megatron"
            for file in [
                *(ROOT / "configs").rglob("*.yaml"),
                *(ROOT / "configs").glob("ds/*.json"),
            ]:
                target = package / file.relative_to(ROOT)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(
    name="lag_megatron",
    version=re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1],
    description="Landscape-aware growing of transformers on DeepSpeed and Megatron-Core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    entry_points={
        "console_scripts": [
            f"{command} = lag_megatron.cli.{module}:main" for command, module in COMMANDS.items()
        ]
    },
    cmdclass={"build_py": BuildWithConfigs},
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
        "argcomplete>=3.5,<4",
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
