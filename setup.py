"""Build of the native modules, `_C` for the CPU and `_cuda`; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs without them and runs on its reference ops.
``DP2VAE_FAST_NATIVE=0`` leaves `_C` out on purpose, ``=1`` makes a failed build an error. ``DP2VAE_FAST_CUDA`` says the
same of `_cuda`; left out, that is built beside `_C` where torch is a CUDA build and nvcc is found.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, find_packages, setup

NATIVE = os.environ.get("DP2VAE_FAST_NATIVE", "auto")
CUDA = os.environ.get("DP2VAE_FAST_CUDA", "auto")
ARCHITECTURES = os.environ.get("DP2VAE_FAST_CUDA_ARCHS", "80 90 100").split()  # the newest as PTX too
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable interface of torch 2.11: one build serves any later torch
HOST_FLAGS = [
    "-fvisibility=hidden",
    f"-fmacro-prefix-map={os.path.dirname(os.path.abspath(__file__))}/=",  # error messages name no build folder
]


def build_cuda(path):
    """Compile and link the CUDA module by nvcc alone: torch's own CUDA extensions ask for a CUDA build of torch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    architectures = [name for name in ARCHITECTURES if f"compute_{name}" in known]
    if not architectures:
        raise ValueError(f"{nvcc} knows none of the architectures {' '.join(ARCHITECTURES)}")
    newest = architectures[-1]
    built_for = f"sm_{' sm_'.join(architectures)} compute_{newest}"
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-o", path]
    command += ["-cudart=static"]  # so it needs no library but torch's, and loads beside a CPU build of that
    command += ["-fmad=false"]  # or the GPU would round otherwise than the CPU
    command += ["-Xptxas=-v"]  # registers and spills, which the tests read
    command += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    command += [f"-gencode=arch=compute_{newest},code=compute_{newest}"]
    command += ["-Xcompiler=" + ",".join(["-fPIC", *HOST_FLAGS])]
    command += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f'-DDP2VAE_CUDA_BUILD="{built_for}"']
    command += [f"-I{folder}" for folder in ["csrc", *include_paths(), sysconfig.get_paths()["include"]]]
    command += sorted([*glob("csrc/cuda/*.cu"), *glob("csrc/cuda/*.cpp")])
    command += [f"-L{folder}" for folder in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    subprocess.run(command, check=True)


def native_build():
    """The extension modules and their build command; nothing where torch or pybind11 is missing."""
    if NATIVE == "0" and CUDA != "1":
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if "1" in (NATIVE, CUDA):
            raise
        print(f"dp2vae_fast: installing without the native module ({error})", file=sys.stderr)
        return {}

    class BuildNative(BuildExtension):
        def build_extensions(self):
            wanted, built = self.extensions, []
            for extension in wanted:
                cuda = extension.name == cuda_module.name
                self.extensions = [extension]
                try:
                    build_cuda(self.get_ext_fullpath(extension.name)) if cuda else super().build_extensions()
                    built.append(extension)
                except Exception as error:  # whatever a missing or broken compiler raises
                    if (CUDA if cuda else NATIVE) == "1":
                        raise
                    which = "CUDA" if cuda else "native"
                    print(f"dp2vae_fast: installing without the {which} module ({error})", file=sys.stderr)
            self.extensions = built

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
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-psabi",
            *HOST_FLAGS,
        ],
        optional=NATIVE != "1",
    )
    cuda_module = Extension("dp2vae_fast._cuda", [], optional=CUDA != "1")
    modules = [module] if NATIVE != "0" else []
    if CUDA == "1" or (CUDA != "0" and NATIVE != "0" and torch.version.cuda is not None):
        modules.append(cuda_module)
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildNative}}


setup(
    packages=[*find_packages(include=["dp2vae_fast", "dp2vae_fast.*"]), "dp2vae_fast.kernels"],
    package_dir={"dp2vae_fast": "dp2vae_fast", "dp2vae_fast.kernels": "kernels"},
    package_data={"dp2vae_fast": ["py.typed", "recipes/*.toml"], "dp2vae_fast.kernels": ["tuned/*.json"]},
    **native_build(),
)
