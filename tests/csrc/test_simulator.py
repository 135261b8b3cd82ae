"""The CUDA simulator, and kernels in it: right ones pass, each deliberate mistake is caught.

To put another kernel under the mutation tests, add a `Kernel` row: a torch-free `.cu` file, a
driver with a `main` that returns nonzero when a result is wrong, and the files both link to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mutate
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or ""
FLAGS = ["-std=c++17", "-g", "-O1", "-DFASTPRUNE_SIM", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # #pragma unroll
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
SANITIZERS = {
    "none": WARNINGS,
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SCHEDULES = [("0", "random"), ("1", "random"), ("0", "forward"), ("0", "reversed")]
TIMEOUT_S = 120

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler (g++ or CXX)")


@dataclass(frozen=True)
class Kernel:
    """A file under mutation. `harmless` maps a site's name to why its loss is no mistake."""

    source: Path
    driver: Path
    also: tuple[Path, ...] = ()
    includers: tuple[Path, ...] = ()  # of a header: the files that are compiled with it
    daily: bool = True  # its mutants are few and quick enough for every run
    harmless: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def sites(self) -> list[mutate.Site]:
        return mutate.find_sites(self.source.read_text())


SELECTION = [ROOT / f"csrc/cuda/{name}.cu" for name in ("select", "select_masks", "block_scores")]
SDPRUN = [ROOT / f"csrc/cuda/sdprun{part}.cu" for part in ("", "_columns", "_guard")]
SELECTION = [
    ROOT / f"csrc/cuda/{name}.cu"
    for name in ("select", "select_bracket", "select_masks", "block_scores")
]
ASWL = [ROOT / f"csrc/cuda/aswl{part}.cu" for part in ("", "_attention")]
KERNELS = [
    Kernel(HERE / "kernels/histogram.cu", HERE / "histogram_driver.cpp"),
    *(
        Kernel(
            source,
            HERE / "select_driver.cpp",
            also=tuple(other for other in SELECTION if other != source),
            daily=False,
        )
        for source in SELECTION
    ),
    Kernel(
        ROOT / "csrc/cuda/selection.cuh",
        HERE / "select_driver.cpp",
        also=tuple(SELECTION[2:]),
        includers=tuple(SELECTION[:2]),
        daily=False,
    ),
    Kernel(ROOT / "csrc/cuda/gsm.cu", HERE / "gsm_driver.cpp", daily=False),
    Kernel(ROOT / "csrc/cuda/masked_sgd.cu", HERE / "masked_sgd_driver.cpp", daily=False),
    Kernel(
        ROOT / "csrc/cuda/dirichlet.cu",
        HERE / "dirichlet_driver.cpp",
        also=(ROOT / "csrc/cpu/dirichlet.cpp",),
        daily=False,
    ),
    *(
        Kernel(
            source,
            HERE / "sdprun_driver.cpp",
            also=tuple(other for other in SDPRUN if other != source),
            daily=False,
        )
        for source in SDPRUN
    ),
    *(
        Kernel(
            source,
            HERE / "aswl_driver.cpp",
            also=(*(other for other in ASWL if other != source), *SELECTION[:2]),
            daily=False,
        )
        for source in ASWL
    ),
]
MUTANTS = [
    pytest.param(
        kernel,
        site,
        id=f"{kernel.source.stem}-{site.name}",
        marks=[] if kernel.daily else pytest.mark.evidence,
    )
    for kernel in KERNELS
    for site in kernel.sites
    if site.name not in kernel.harmless
]


class Workshop:
    """Builds programs two at a time; each object file and program is built once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.workers = ThreadPoolExecutor(2)
        self.built: dict[tuple, Future[Path]] = {}

    def program(self, kernel: Kernel, sanitizer: str, site: mutate.Site | None = None):
        # Submitted before the program that waits for them, so two workers never wait for nothing.
        objects = [
            self._once(("object", source, sanitizer), self._compile, source)
            for source in (kernel.driver, *kernel.also)
        ]
        key = ("program", kernel.source, sanitizer, site)
        return self._once(key, self._link, kernel, objects, site)

    def single(self, source: Path, sanitizer: str) -> Future[Path]:
        return self._once(("single", source, sanitizer), self._compile, source, False)

    def _once(self, key: tuple, build, *arguments) -> Future[Path]:
        if key not in self.built:
            output = self.folder / f"{len(self.built)}"
            self.built[key] = self.workers.submit(build, output, key[2], *arguments)
        return self.built[key]

    def _compile(self, output: Path, sanitizer: str, source: Path, to_object=True) -> Path:
        what = ["-c"] if to_object else []
        return self._run(output, sanitizer, [*what, "-x", "c++", str(source)])

    def _link(self, output: Path, sanitizer: str, kernel: Kernel, objects, site) -> Path:
        sources = kernel.includers or (kernel.source,)
        folder = output.with_suffix(".mutant")
        if site is not None:
            mutant = folder / kernel.source.parent.name / kernel.source.name
            mutant.parent.mkdir(parents=True)
            mutant.write_text(mutate.mutate(kernel.source.read_text(), site))
            sources = kernel.includers or (mutant,)
        inputs = ["-x", "c++", *map(str, sources), "-x", "none"]
        inputs += (str(o.result()) for o in objects)
        # A mutant lies elsewhere, but still finds the headers beside the original; a mutated header
        # is found before its original.
        folders = ["-iquote", str(folder), f"-I{kernel.source.parent}"]
        return self._run(output, sanitizer, [*folders, *inputs])

    def _run(self, output: Path, sanitizer: str, arguments: list[str]) -> Path:
        command = [COMPILER, *FLAGS, *SANITIZERS[sanitizer], *INCLUDES, *arguments]
        done = subprocess.run(
            [*command, "-o", str(output)], capture_output=True, text=True, cwd=self.folder
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return output


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, request):
    shop = Workshop(tmp_path_factory.mktemp("simulator"))
    # Everything the collected tests will ask for is built while the first ones run.
    for item in request.session.items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        if item.module is request.module and "site" in values:
            shop.program(values["kernel"], mutate.SANITIZER_OF[values["site"].kind], values["site"])
    yield shop
    shop.workers.shutdown(cancel_futures=True)


def execute(program: Path, *arguments: str, seed: str = "0", order: str = "random"):
    environment = {
        **os.environ,
        "FASTPRUNE_SIM_SEED": seed,
        "FASTPRUNE_SIM_ORDER": order,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_every_check_of_the_simulator_passes(workshop, sanitizer):
    program = workshop.single(HERE / "simulator_checks.cu", sanitizer).result()
    schedules = SCHEDULES if sanitizer != "thread" else SCHEDULES[:1]
    for seed, order in schedules:
        done = execute(program, seed=seed, order=order)
        assert done.returncode == 0, done.stderr
        assert "invalid_launches" in done.stdout


@pytest.mark.parametrize(
    "mistake, sanitizer, message",
    [
        ("barrier_in_branch", "none", "deadlock"),
        ("full_mask_in_branch", "none", "__shfl_sync with mask 0xffffffff"),
        ("two_barriers", "none", "divergent barrier"),
        ("mask_without_self", "none", "does not name it"),
        ("width", "none", "width of a shuffle"),
        ("dynamic_index", "address", "heap-buffer-overflow"),
        ("static_index", "address", "out of bounds"),
        ("global_index", "address", "heap-buffer-overflow"),
        ("no_barrier", "thread", "data race"),
        ("no_atomic_between_blocks", "thread", "data race"),
        ("no_fence", "thread", "data race"),
        ("shuffle_for_syncwarp", "thread", "data race"),
    ],
)
def test_a_mistake_is_reported(workshop, mistake, sanitizer, message):
    program = workshop.single(HERE / "simulator_checks.cu", sanitizer).result()
    done = execute(program, mistake)
    assert done.returncode != 0
    assert message in done.stderr
    if sanitizer == "none":
        assert "launched at " in done.stderr and "simulator_checks.cu:" in done.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(
    "kernel", {k.driver: k for k in KERNELS}.values(), ids=lambda kernel: kernel.driver.stem
)
def test_right_kernels_pass(workshop, kernel, sanitizer):
    program = workshop.program(kernel, sanitizer).result()
    for seed, order in SCHEDULES if kernel.daily or sanitizer != "thread" else SCHEDULES[:1]:
        done = execute(program, seed=seed, order=order)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel, site", MUTANTS)
def test_a_mutant_fails(workshop, kernel, site):
    program = workshop.program(kernel, mutate.SANITIZER_OF[site.kind], site).result()
    for seed, order in SCHEDULES:
        try:
            if execute(program, seed=seed, order=order).returncode != 0:
                return
        except subprocess.TimeoutExpired:
            return
    pytest.fail(f"{kernel.source.name} passes its checks without this {site.name}")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.source.stem)
def test_the_list_of_harmless_sites_is_up_to_date(kernel):
    assert kernel.harmless.keys() <= {site.name for site in kernel.sites}


def test_mutation_leaves_comments_and_strings_alone():
    source = '// __syncthreads();\nprint("__syncthreads();"); /* atomicAdd( */ __syncthreads();\n'
    (site,) = mutate.find_sites(source)
    assert mutate.mutate(source, site).endswith("/* atomicAdd( */ ;\n")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [str(Path(home, "bin/nvcc")) for home in homes if home]
    return next(filter(None, map(shutil.which, [*candidates, "nvcc"])), None)


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc (CUDA_HOME or PATH)")
def test_nvcc_accepts_the_same_source(tmp_path):
    kernel = KERNELS[0]  # those of the library have test_cuda_resources.py
    code = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90, 100)]
    command = [find_nvcc(), "-std=c++17", "--threads=2", *code, *INCLUDES, "-c"]
    done = subprocess.run(
        [*command, str(kernel.source), "-o", str(tmp_path / "kernel.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
