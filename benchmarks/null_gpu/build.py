"""Builds the null GPU for the installed torch; needs a compiler and the CUDA headers of torch's packages."""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
TORCH_LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
CUDA = re.compile(r"(cuda|__cuda|cublas|cudnn|cusolver|cusparse|cufft|curand)[A-Z_]")
# Functions that start a kernel, among those that need no more than a count.
KERNEL = re.compile(
    r"cublas\w*([gG]emm|[gG]emv|[dD]ot|trsm)|cublasLtMatmul$"
    r"|cudnn(Convolution\w*(Forward|BackwardData|BackwardFilter)|BatchNormalization(Forward|Backward)\w*|PoolingForward)$"
)


def obstacle() -> str | None:
    """Why the null GPU cannot be built here; None if it can."""
    missing = [tool for tool in ("g++", "gcc", "nm") if shutil.which(tool) is None]
    if missing:
        return f"no {' and '.join(missing)}"
    lost = [str(folder) for folder in _headers() if not folder.is_dir()]
    if lost or not (_torch() / "libtorch_cuda.so").exists():
        return "torch has no CUDA here" if not lost else f"no {lost[0]}"
    return None


def build(folder: Path) -> dict[str, str]:
    """Builds into a folder.

    Returns:
        The environment in which a new process has one null GPU.

    Raises:
        subprocess.CalledProcessError: the compiler refuses.
    """
    includes = [f"-I{path}" for path in _headers()]
    objects = []
    for name in ("runtime", "cudnn"):
        objects.append(folder / f"{name}.o")
        _run("g++", "-w", "-O1", "-fPIC", "-c", *includes, HERE / f"{name}.cpp", "-o", objects[-1])
    written = {name for path in objects for name in _symbols("--defined-only", path)}
    wanted = {name for library in TORCH_LIBRARIES for name in _symbols("--undefined-only", "-D", _torch() / library)}
    rest = sorted(name for name in wanted - written if CUDA.match(name))
    _library(folder / "libnull_gpu.so", rest, objects)
    driver = [
        name for name in _symbols("--undefined-only", "-D", _torch() / "libcaffe2_nvrtc.so") if name.startswith("cu")
    ]
    _library(folder / "libcuda.so.1", driver, [])
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libnull_gpu.so"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "0",
    }


def _library(path: Path, names: list[str], objects: list[Path]) -> None:
    """A library of functions that return 0, count as a kernel or give the current context."""
    lines = ["int null_gpu_library_call(void);"]
    for name in names:
        if name == "cuCtxGetCurrent":
            lines.append(f"int {name}(void **context) {{ *context = (void *)1; return 0; }}")
        else:
            lines.append(f"int {name}(void) {{ return {'null_gpu_library_call()' if KERNEL.match(name) else '0'}; }}")
    source = path.with_suffix(".c")
    source.write_text("\n".join(lines) + "\n")
    _run("gcc", "-w", "-O1", "-fPIC", "-c", source, "-o", source.with_suffix(".o"))
    _run("g++", "-shared", f"-Wl,-soname,{path.name}", source.with_suffix(".o"), *objects, "-o", path)


def _symbols(*arguments: str | Path) -> list[str]:
    output = subprocess.run(["nm", *map(str, arguments)], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1].split("@")[0] for line in output.splitlines() if line.strip()]


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib"


def _headers() -> list[Path]:
    """Where the packages keep the headers; Triton's, of another release, are there for what the others include."""
    packages = Path(sysconfig.get_path("purelib"))
    runtime = sorted(packages.glob("nvidia/cu1*/include")) or [packages / "nvidia/cuda_runtime/include"]
    return [runtime[-1], packages / "nvidia/cudnn/include", packages / "triton/backends/nvidia/include"]
