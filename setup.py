"""Build of the native module; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs without the module and runs on its reference ops.
``DP2VAE_FAST_NATIVE=0`` leaves the module out on purpose, ``=1`` makes a failed build an error.
"""

import os
import sys
from glob import glob

from setuptools import find_packages, setup

NATIVE = os.environ.get("DP2VAE_FAST_NATIVE", "auto")
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable interface of torch 2.11: one build serves any later torch


def native_build():
    """The extension module and its build command; nothing where torch or pybind11 is missing."""
    if NATIVE == "0":
        return {}
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if NATIVE == "1":
            raise
        print(f"dp2vae_fast: installing without the native module ({error})", file=sys.stderr)
        return {}

    class BuildNative(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # whatever a missing or broken compiler raises
                if NATIVE == "1":
                    raise
                print(f"dp2vae_fast: installing without the native module ({error})", file=sys.stderr)
                self.extensions = []

    module = CppExtension(
        "dp2vae_fast._C",
        sorted(["csrc/bindings.cpp", *glob("csrc/cpu/*.cpp")]),
        include_dirs=["csrc", pybind11.get_include()],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-psabi",
            f"-fmacro-prefix-map={os.path.dirname(os.path.abspath(__file__))}/=",  # error messages name no build folder
        ],
        optional=NATIVE != "1",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildNative}}


setup(
    packages=[*find_packages(include=["dp2vae_fast", "dp2vae_fast.*"]), "dp2vae_fast.kernels"],
    package_dir={"dp2vae_fast": "dp2vae_fast", "dp2vae_fast.kernels": "kernels"},
    package_data={"dp2vae_fast": ["py.typed", "recipes/*.toml"]},
    **native_build(),
)
