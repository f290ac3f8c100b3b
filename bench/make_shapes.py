"""Writes shapes/*.json, the parameter shapes that clip.py builds its gradients from.

    python bench/make_shapes.py

The files are what is measured; they are kept so that nothing has to be installed or downloaded to
know the shapes of a model. Each lists the tensors in the order of `model.parameters()`, equal
neighbours as one entry with a count. A test compares files, formulas and published counts.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

SHAPES_FOLDER = Path(__file__).resolve().parent / "shapes"


def lstm() -> list[Shape]:
    return [(1024, 28), (1024, 256), (1024,), (1024,), (10, 256), (10,)]


def mlp() -> list[Shape]:
    return [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)]


def resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for convolution in convolutions:
                shapes += normalized(convolution)
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


# Input channels, kernel size, expanded channels, output channels, squeeze and excitation.
MOBILENET_V3_LARGE = (
    (16, 3, 16, 16, False),
    (16, 3, 64, 24, False),
    (24, 3, 72, 24, False),
    (24, 5, 72, 40, True),
    (40, 5, 120, 40, True),
    (40, 5, 120, 40, True),
    (40, 3, 240, 80, False),
    (80, 3, 200, 80, False),
    (80, 3, 184, 80, False),
    (80, 3, 184, 80, False),
    (80, 3, 480, 112, True),
    (112, 3, 672, 112, True),
    (112, 5, 672, 160, True),
    (160, 5, 960, 160, True),
    (160, 5, 960, 160, True),
)


def mobilenet_v3() -> list[Shape]:
    shapes = normalized((16, 3, 3, 3))
    for inputs, kernel, expanded, outputs, squeezes in MOBILENET_V3_LARGE:
        if expanded != inputs:
            shapes += normalized((expanded, inputs, 1, 1))
        shapes += normalized((expanded, 1, kernel, kernel))
        if squeezes:
            squeezed = multiple_of_8(expanded // 4)
            shapes += [(squeezed, expanded, 1, 1), (squeezed,)]
            shapes += [(expanded, squeezed, 1, 1), (expanded,)]
        shapes += normalized((outputs, expanded, 1, 1))
    return [*shapes, *normalized((960, 160, 1, 1)), (1280, 960), (1280,), (1000, 1280), (1000,)]


def normalized(convolution: Shape) -> list[Shape]:
    """A convolution without bias and the batch normalization behind it."""
    return [convolution, (convolution[0],), (convolution[0],)]


def multiple_of_8(channels: int) -> int:
    """The rounding of the MobileNets: to the nearest multiple, but never down by over 10 %."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def vit_b() -> list[Shape]:
    width = 768
    block: list[Shape] = [
        *[(width,), (width,)],
        *[(3 * width, width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],
    ]
    embedding: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*embedding, *block * 12, (width,), (width,), (1000, width), (1000,)]


def gpt2() -> list[Shape]:
    width = 768
    block: list[Shape] = [
        *[(width,), (width,)],
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *block * 12, (width,), (width,)]


def llama3_8b() -> list[Shape]:
    width, keys, hidden, vocabulary = 4096, 1024, 14336, 128256
    block: list[Shape] = [
        *[(width, width), (keys, width), (keys, width), (width, width)],
        *[(hidden, width), (hidden, width), (width, hidden)],
        *[(width,), (width,)],
    ]
    return [(vocabulary, width), *block * 32, (width,), (vocabulary, width)]


# 4.5 million elements, with sizes that no vector length divides among them.
MIXED_CYCLE: list[Shape] = [
    *[(1024, 1024), (1000, 1000), (768, 1024), (512, 1024), (700, 700)],
    *[(512, 512), (300, 700), (256, 512), (64, 371), (371, 64)],
]


def mixed(divisor: int) -> list[tuple[Shape, str]]:
    """500 matrices, whose sides are divided; the dtypes alternate, also from cycle to cycle."""
    return [
        ((rows // divisor, columns // divisor), ("bfloat16", "float32")[(place + cycle) % 2])
        for cycle in range(50)
        for place, (rows, columns) in enumerate(MIXED_CYCLE)
    ]


def entries(tensors: list[Any]) -> list[dict[str, Any]]:
    """Joins equal neighbours. A tensor is a shape, or a shape and a dtype."""
    result = []
    for tensor, group in itertools.groupby(tensors):
        has_dtype = len(tensor) == 2 and isinstance(tensor[1], str)
        shape, dtype = tensor if has_dtype else (tensor, None)
        entry: dict[str, Any] = {"count": len(list(group)), "shape": list(shape)}
        result.append({**entry, "dtype": dtype} if dtype else entry)
    return result


def workloads() -> dict[str, dict[str, Any]]:
    """The content of every file, by its name.

    "dtype" is set where the workload makes sense in one only; "devices" says where a run takes the
    workload unless told which to take.
    """

    def workload(
        about: str, tensors: list[Any], dtype: str | None = None, devices: str = "cpu cuda"
    ) -> dict[str, Any]:
        head = {"about": about, "dtype": dtype, "devices": devices.split()}
        return {**head, "tensors": entries(tensors)}

    return {
        "one_scalar": workload("One tensor of no dimension: what a call costs at least", [()]),
        "many_small_10": workload("10 tensors of 8 elements", [(8,)] * 10),
        "many_small_100": workload("100 tensors of 8 elements", [(8,)] * 100),
        "many_small": workload("1000 tensors of 8 elements", [(8,)] * 1000),
        "small": workload("10 linear layers, 64 to 64", [(64, 64), (64,)] * 10),
        "lstm": workload("One LSTM layer, 28 inputs, hidden 256, and 10 classes", lstm()),
        "mlp": workload("Linear layers 784, 512, 512, 10", mlp()),
        "1000x1000": workload("1000 tensors of 1000 elements", [(1000,)] * 1000),
        "mobilenet_v3": workload(
            "Howard et al., Searching for MobileNetV3 (2019), large", mobilenet_v3()
        ),
        "mixed_500_small": workload(
            "mixed_500 with sides four times shorter", mixed(4), "mixed", "cpu"
        ),
        "resnet50": workload(
            "He et al., Deep Residual Learning for Image Recognition (2015), ResNet-50", resnet50()
        ),
        "one_huge": workload("One matrix of 64 Mi elements", [(8192, 8192)]),
        "vit_b": workload("Dosovitskiy et al., An Image is Worth 16x16 Words (2020)", vit_b()),
        "gpt2": workload(
            "Radford et al., Language Models are Unsupervised Multitask Learners (2019), 124M",
            gpt2(),
        ),
        "mixed_500": workload("500 matrices, bfloat16 and float32", mixed(1), "mixed", "cuda"),
        "one_1536m": workload(
            "One tensor of 1.536 G elements, as measured in NeMo Automodel's pull request 3685",
            [(1_536_000_000,)],
            "bfloat16",
            "cuda",
        ),
        "llama3_8b": workload(
            "Grattafiori et al., The Llama 3 Herd of Models (2024), 8B",
            llama3_8b(),
            "bfloat16",
            "cuda",
        ),
    }


def text(workload: dict[str, Any]) -> str:
    """As JSON with a line for each entry, so that a changed shape is a changed line."""
    head = {key: value for key, value in workload.items() if key != "tensors"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
    tensors = ",\n".join(f"  {json.dumps(entry)}" for entry in workload["tensors"])
    return "{\n" + "".join(lines) + f' "tensors": [\n{tensors}\n ]\n}}\n'


def main() -> None:
    SHAPES_FOLDER.mkdir(exist_ok=True)
    for name, workload in workloads().items():
        (SHAPES_FOLDER / f"{name}.json").write_text(text(workload))
        print(f"{name}.json")


if __name__ == "__main__":
    main()
