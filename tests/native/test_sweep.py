"""The sweep of the CUDA kernels' variants (bench/cuda), as far as it can be tested without a GPU.

The bodies of the variants run in the emulation of tests/native/emulation.h, clusters included, and
with mistakes put into them, each of which has to be caught; the host's part runs as it is.
"""

from __future__ import annotations

import csv
import math
import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import linked, object_file

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests/native"
SWEEP = ROOT / "bench/cuda"
CSRC = ROOT / "csrc"
# Includes the bodies of the variants, which mutants change.
BODIES = NATIVE / "sweep_kernels.cpp"
KERNEL_TESTS = [
    NATIVE / "test_sweep_kernels.cpp",
    *(NATIVE / name for name in ("grid.cpp", "kernel_testing.cpp", "kernels.cpp")),
    CSRC / "cuda/plan.cpp",
]
# The whole of it, the GPU being emulated.
PROGRAM = [
    *(SWEEP / name for name in ("small_lists.cu", "measuring.cu", "scaling.cu")),
    *(SWEEP / f"{name}.cpp" for name in ("sweep", "gpu", "lists", "report", "today")),
    *(CSRC / "cuda" / name for name in ("launch.cu", "plan.cpp")),
    *(NATIVE / name for name in ("grid.cpp", "sweep_gpu_kernels.cpp")),
]
HOST = [NATIVE / "test_sweep_lists.cpp", SWEEP / "lists.cpp", SWEEP / "report.cpp"]

SANITIZERS = ["-std=c++17", "-O1", "-g", "-fno-sanitize-recover=all"]
# Options and the number of threads in a block.
BUILDS = {
    "c++17": (["-std=c++17", "-O2"], 256),
    "c++20": (["-std=c++20", "-O1"], 32),
    "address and undefined behavior sanitizers": (
        [*SANITIZERS, "-fsanitize=address,undefined"],
        64,
    ),
}
MUTANT_BUILD = (["-std=c++17", "-O0"], 64)

ARRIVE = "arrive_at_cluster_barrier();\n"
WAIT = "wait_at_cluster_barrier();\n"
BEFORE_READING = f"of_block = total;\n    {ARRIVE}    {WAIT}"

# What is replaced in bench/cuda/bodies.cuh.
NO_MUTANT = "nothing changed"
MUTANTS = {
    NO_MUTANT: {},
    # Clusters.
    "no cluster barrier before sums are read": {BEFORE_READING: "of_block = total;\n"},
    "no wait for the cluster before sums are read": {
        BEFORE_READING: f"of_block = total;\n    {ARRIVE}"
    },
    "block that ends before others have read its sum": {
        f"its sum; see the end.\n    {ARRIVE}": "its sum.\n",
        f"if constexpr (kCluster) {WAIT}": "",
    },
    "cluster barrier in the first block alone": {
        f"if constexpr (kCluster) {WAIT}": f"if (kCluster && blockIdx.x == 0) {WAIT}"
    },
    "sum of the own block read for all": {"load_from_block(of_block, block)": "of_block"},
    "sum of the last block left out": {
        "block < table.workers ? load": "block + 1 < table.workers ? load"
    },
    # Teams.
    "warps that take the same tiles": {
        " * kTeams + static_cast<int>(threadIdx.x) / kTeam;": " * kTeams;"
    },
    "threads of a team that take the block's places": {
        "rank = static_cast<int>(threadIdx.x) % kTeam;\n  const auto add": (
            "rank = static_cast<int>(threadIdx.x);\n  const auto add"
        )
    },
    # Order of tiles.
    "last chunk left out": {"(chunks - static_cast<uint32_t>(worker) + workers - 1)": "chunks"},
    "chunks that are not as far apart as they are long": {
        "const int64_t end = (begin + 1) * step;": "const int64_t end = begin * step + 1;"
    },
    "walk back that starts at the first tensor": {
        "kForward ? tiles.begin : tiles.end - 1);": "tiles.begin);"
    },
    # Loads in flight.
    "second chain left out": {"total = c == 0 ? sum : total + sum;": "total = sum;"},
    "second chain left out where numbers are read again": {
        "for (int c = 0; c < kChains; ++c, vectors += kMost": (
            "for (int c = 0; c < 1; ++c, vectors += kMost"
        )
    },
    "range of the last chain alone": {
        "all_in_range = all_in_range && in_range": "all_in_range = in_range"
    },
    "last vectors scaled first, and again": {"if (!kWhole && k * kTeam >= left) continue;": ""},
    # Prologues.
    "no wait": {"if constexpr (!kHoisted) wait_for_previous_kernel();": ""},
    "no wait after what is hoisted": {"if constexpr (kHoisted) wait_for_previous_kernel();": ""},
    "partials beyond four for each thread left out": {
        "for (; i < count; i += kAtOnce * kThreads) {": "if (i < count) {"
    },
}


def built(sources, options, folder, bodies=SWEEP, runtime=()):
    """The program of these sources, with the headers in `runtime` before all others."""
    options = [*options, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

    def compiled(source):
        # g++ takes a .cu for something to be linked.
        language = [] if source.suffix == ".cpp" else ["-xc++"]
        # Those of the sweep include what lies beside them.
        place = bodies / source.name if source.parent == SWEEP else source
        return object_file(place, [*options, *language], [*runtime, CSRC, NATIVE, bodies])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    return linked(folder / "program", objects, [*options, "-pthread"])


def emulating(options, threads):
    return [*options, "-DGRADCLIP_EMULATION", f"-DGRADCLIP_THREADS={threads}"]


def run(program, *arguments):
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def require_checks(result, least):
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) checks", result.stdout)[1]) > least


@pytest.mark.parametrize("build_name", BUILDS)
def test_variants_on_the_cpu(build_name, tmp_path):
    options, threads = BUILDS[build_name]
    program = built([BODIES, *KERNEL_TESTS], emulating(options, threads), tmp_path)
    require_checks(run(program), 2000)


def mutated(mutant, folder):
    """A copy of bench/cuda with a mistake in it."""
    changed = folder / "cuda"
    shutil.copytree(SWEEP, changed)
    file = changed / "bodies.cuh"
    source = file.read_text(encoding="utf-8")
    for old, new in MUTANTS[mutant].items():
        assert source.count(old) == 1, f"bodies.cuh should hold this once: {old}"
        source = source.replace(old, new)
    file.write_text(source, encoding="utf-8")
    return changed


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, tmp_path):
    changed = mutated(mutant, tmp_path)
    options, threads = MUTANT_BUILD
    program = built([BODIES, *KERNEL_TESTS], emulating(options, threads), tmp_path, changed)
    result = run(program, "--quick")
    if mutant == NO_MUTANT:
        assert result.returncode == 0, result.stdout
        return
    assert result.returncode != 0, f"nobody noticed: {result.stdout}"
    # By a test or by the processor, not because it could not start.
    assert result.stdout or result.returncode < 0, result


def rehearsal(folder, bodies=SWEEP):
    """The program that runs on a GPU, over the emulation; its times mean nothing."""
    options = ["-std=c++17", "-O1", "-DGRADCLIP_EMULATION"]
    return built(PROGRAM, options, folder, bodies, [NATIVE / "emulated_sweep"])


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_family_in_the_emulation(tmp_path):
    program, file = rehearsal(tmp_path), tmp_path / "sweep.csv"
    counts = {"bandwidth": 2, "small": 32, "order": 89, "scale": 38, "prologue": 22}
    for family, count in counts.items():
        result = run(program, file, family, "--rehearse")
        assert result.returncode == 0, result.stdout + result.stderr
        rows = [row for row in rows_of(file) if row["family"] == family]
        assert len(rows) == count
        assert {row["status"] for row in rows} == {"ok"}
        assert all(float(row["median_us"]) > 0 for row in rows)
        assert all(family == "bandwidth" or int(row["repeats"]) >= 9 for row in rows)
    # The emulation has a kernel that is wrong.
    result = run(program, file, "parameters")
    assert result.returncode == 1
    statuses = {row["variant"]: row["status"] for row in rows_of(file)[-2:]}
    assert statuses == {"8 bytes": "ok", "1024 bytes": "wrong"}
    result = run(program, file, "table")
    assert result.returncode == 0
    assert result.stdout.startswith("wrong: parameters launch, none: 1024 bytes")
    assert len(result.stdout.splitlines()) == 1 + 2 + 1 + 4


@pytest.mark.parametrize(
    "mutant, family, wrong, note",
    [
        (
            "second chain left out",
            "order",
            lambda row: row["loads"] == "8",
            r"the norm is [\d.]+ and not [\d.]+",
        ),
        (
            "chunks that are not as far apart as they are long",
            "scale",
            lambda row: re.match(r"strided by (4|16)", row["variant"]),
            r"tensor \d+, element \d+ is -?[\d.e-]+ and not -?[\d.e-]+",
        ),
    ],
)
def test_what_is_wrong_is_said_and_not_timed(mutant, family, wrong, note, tmp_path):
    program = rehearsal(tmp_path, mutated(mutant, tmp_path))
    result = run(program, tmp_path / "sweep.csv", family, "--rehearse")
    assert result.returncode == 1
    rows = rows_of(tmp_path / "sweep.csv")
    for row in rows:
        assert row["status"] == ("wrong" if wrong(row) else "ok"), row
        assert (row["median_us"] == "") == (row["status"] == "wrong")
        assert row["status"] == "ok" or re.fullmatch(note, row["note"]), row
    assert {row["status"] for row in rows} == {"ok", "wrong"}


@pytest.mark.parametrize("arguments", [[], ["order", "--second"], ["order", "--seconds", "0"]])
def test_bad_arguments(arguments, tmp_path):
    result = run(rehearsal(tmp_path), tmp_path / "sweep.csv", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: sweep CSV FAMILY")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_lists_and_report(sanitizers, tmp_path):
    program = built(HOST, [*SANITIZERS, f"-fsanitize={sanitizers}", "-pthread"], tmp_path)
    require_checks(run(program, tmp_path), 100_000)


def test_shapes_are_those_of_the_other_benchmarks(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        workloads = runpy.run_path(str(ROOT / "bench/workloads.py"))["WORKLOADS"]
    program = built(HOST, ["-std=c++17", "-O2"], tmp_path)
    lines = run(program, "--shapes").stdout.splitlines()
    names = ["resnet50", "gpt2", "llama3_8b"]
    for name, line in zip(names, lines, strict=True):
        expected = [math.prod(shape) for shape in workloads[name].shapes]
        if name == "llama3_8b":
            # Without the embedding, the last norm and the head.
            expected = expected[1:-2]
        assert [int(number) for number in line.split()] == expected


class TestScript:
    """bench/cuda/run.sh, with programs in the places of nvcc, nvidia-smi and the sweep."""

    @pytest.fixture
    def call(self, tmp_path):
        def call(*arguments, nvcc="exit 0", smi="echo 9.0"):
            tools = tmp_path / "toolkit/bin"
            (tmp_path / "toolkit/include").mkdir(parents=True, exist_ok=True)
            (tmp_path / "toolkit/include/cuda_runtime.h").touch()
            tools.mkdir(exist_ok=True)
            version = 'case "$*" in *--version*) echo "release 13.0"; exit 0 ;; esac\n'
            for name, text in {"nvcc": version + nvcc, "nvidia-smi": smi}.items():
                file = tools / name
                file.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
                file.chmod(0o755)
            copy = tmp_path / "project"
            if not copy.exists():
                shutil.copytree(SWEEP, copy / "bench/cuda")
                shutil.copytree(ROOT / "tools", copy / "tools")
            environment = {
                **os.environ,
                "CUDA_HOME": str(tmp_path / "toolkit"),
                "PATH": f"{tools}:{os.environ['PATH']}",
            }
            return subprocess.run(
                ["bash", copy / "bench/cuda/run.sh", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        return call

    # Instead of a program, nvcc links a script that writes down how it was called.
    SWEEP = """
    for argument; do last=$argument; [ "$argument" = -c ] && exit 0; done
    cat > "$last" << 'END'
    #!/bin/bash
    echo "sweep ${*:2}"
    case " $BROKEN " in *" $2 "*) exit 1 ;; esac
    [ "$2" = table ] || echo "$2" >> "$1"
    END
    sed -i 's/^    //' "$last"
    chmod +x "$last"
    """.replace("\n    END", "\nEND")

    def test_dry_run_compiles_only(self, call, tmp_path):
        result = call(tmp_path / "out.csv", "--dry-run", smi="exit 9")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("compiled for sm_90 in ")
        assert not (tmp_path / "out.csv").exists()

    def test_what_does_not_compile(self, call, tmp_path):
        fails = 'case "$*" in *scaling.cu*) exit 1 ;; esac'
        result = call(tmp_path / "out.csv", "--dry-run", nvcc=fails)
        assert result.returncode == 1
        assert result.stderr == "bench/cuda/scaling.cu does not compile\n"

    @pytest.mark.parametrize("smi", ["exit 9", "echo 'No devices were found'"])
    def test_no_gpu(self, call, tmp_path, smi):
        result = call(tmp_path / "out.csv", smi=smi)
        assert result.returncode == 1
        assert result.stderr == "no GPU: nvidia-smi names none\n"

    def test_csv_that_cannot_be_written(self, call, tmp_path):
        (tmp_path / "file").touch()
        result = call(tmp_path / "file/out.csv")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == f"{tmp_path}/file/out.csv cannot be written"

    def test_every_family_runs(self, call, tmp_path):
        csv = tmp_path / "new/out.csv"
        result = call(csv, nvcc=self.SWEEP)
        assert result.returncode == 0, result.stderr
        families = ["bandwidth", "small", "order", "prologue", "scale", "parameters"]
        assert csv.read_text(encoding="utf-8").split() == families
        calls = [line.split() for line in result.stdout.splitlines() if line.startswith("sweep ")]
        assert [call[1] for call in calls] == [*families, "table"]
        assert all(call[2:] == ["--seconds", "75"] for call in calls[:-1])

    def test_others_run_after_one_that_fails(self, call, tmp_path, monkeypatch):
        monkeypatch.setenv("BROKEN", "small")
        csv = tmp_path / "out.csv"
        result = call(csv, "--families", "small order", "--seconds", "60", nvcc=self.SWEEP)
        assert result.returncode == 1
        assert result.stderr == "small: exit status 1\n"
        assert csv.read_text(encoding="utf-8").split() == ["order"]

    def test_unknown_argument(self, call, tmp_path):
        result = call(tmp_path / "out.csv", "--dry")
        assert result.returncode == 2
        assert result.stderr.startswith("usage: bench/cuda/run.sh CSV_PATH")
