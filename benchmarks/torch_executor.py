"""What running a model through `graphq.torch_executor` costs, beside the same network written by hand in eager torch.

    torch_executor.py vit VIT_TINY.onnx [--batch 8] [--rounds 10]   forward and backward to the image: time, ratio, peak memory
    torch_executor.py peer MODEL.onnx ...                           what onnx2torch makes of models, and of onnx's backend suite

`vit` alternates between the two in one process and takes the median of the ratios of neighbours, since the machine may be busy with
other things; on a CPU it counts the seconds of the process, on one thread unless `--threads` says more. Memory is the growth of the
peak of a process of its own, over three steps. `peer` needs onnx2torch, which needs torchvision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphq import ir
from graphq.torch_executor import TorchExecutor

Network = Callable[[Tensor], Tensor]


def by_executor(model: ir.Model) -> Network:
    run = TorchExecutor(model)
    return lambda images: run.run({"input": images})[0]


def by_hand(model: ir.Model, heads: int = 3) -> Network:
    """timm's vit_tiny_patch16_224 with the weights of `model`, as one would write it in torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {name: torch.tensor(ir.constant(value)).to(device) for name, value in model.graph.initializers.items()}
    products = [given[node.inputs[1].name or ""] for node in model.graph
                if node.op_type == "MatMul" and node.inputs[1] is not None and ir.is_constant(node.inputs[1])]  # fmt: skip
    linear = iter([weight.T.contiguous() for weight in products])
    blocks = [[next(linear) for _ in range(4)] for _ in range(len(products) // 4)]

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], given[f"{name}.weight"], given[f"{name}.bias"], 1e-6)

    def run(images: Tensor) -> Tensor:
        x = functional.conv2d(images, given["patch_embed.proj.weight"], given["patch_embed.proj.bias"], stride=16)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([given["cls_token"].expand(len(x), -1, -1), x], 1) + given["pos_embed"]
        for index, (qkv, proj, fc1, fc2) in enumerate(blocks):
            name = f"blocks.{index}"
            y = functional.linear(norm(x, f"{name}.norm1"), qkv, given[f"{name}.attn.qkv.bias"])
            q, k, v = y.reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + functional.linear(y, proj, given[f"{name}.attn.proj.bias"])
            y = functional.gelu(functional.linear(norm(x, f"{name}.norm2"), fc1, given[f"{name}.mlp.fc1.bias"]))
            x = x + functional.linear(y, fc2, given[f"{name}.mlp.fc2.bias"])
        return functional.linear(norm(x, "norm")[:, 0], given["head.weight"], given["head.bias"])

    return run


MADE = {"executor": by_executor, "by hand": by_hand}


def step(network: Network, images: Tensor) -> float:
    """Seconds of one forward and backward pass; on a CPU those that this process had, since others may be using it too."""
    clock = time.perf_counter if images.is_cuda else time.process_time
    started = clock()
    images.grad = None
    network(images).square().mean().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def images_of(batch: int) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()


def peak_bytes() -> int:
    """So far in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's as well
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def vit(path: str, batch: int, rounds: int) -> None:
    model = ir.load(path)
    images = images_of(batch)
    networks = {name: make(model) for name, make in MADE.items()}
    with torch.no_grad():
        one, other = (network(images) for network in networks.values())
    assert torch.allclose(one, other, atol=1e-3), float((one - other).abs().max())
    for network in networks.values():
        step(network, images)
    times = [[step(network, images) for network in networks.values()] for _ in range(rounds)]
    medians = [statistics.median(row[index] for row in times) for index in range(2)]
    memory = {name: json.loads(subprocess.run([sys.executable, __file__, "memory", path, "--batch", str(batch), "--which", name,
                                               "--threads", str(torch.get_num_threads())],
                                              check=True, capture_output=True, text=True).stdout) for name in networks}  # fmt: skip
    for name, median in zip(networks, medians, strict=True):
        print(f"{name:10s} {1e3 * median / batch:8.1f} ms an image-step {memory[name] / 2**20:8.0f} MiB above the loaded model")
    ratios = sorted(row[0] / row[1] for row in times)
    print(f"ratio      {statistics.median(ratios):8.2f} (of {rounds} rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}, {images.device}")


def memory(path: str, batch: int, which: str) -> None:
    """Growth of this process's peak over three steps, in bytes."""
    network, images = MADE[which](ir.load(path)), images_of(batch)
    with torch.no_grad():
        network(images[:1])
    before = peak_bytes()
    for _ in range(3):
        step(network, images)
    print(json.dumps(peak_bytes() - before))


def peer(paths: list[str]) -> None:
    """Print which models onnx2torch converts, and how many of the backend suite's it computes right, beside the executor."""
    from onnx2torch import convert  # type: ignore[import-not-found, unused-ignore]

    def converted(proto: onnx.ModelProto, inputs: list[np.ndarray]) -> list[Tensor]:
        found = convert(proto)(*[torch.from_numpy(np.array(one)) for one in inputs])
        return list(found) if isinstance(found, list | tuple) else [found]

    def executed(proto: onnx.ModelProto, inputs: list[np.ndarray]) -> list[Tensor]:
        from onnx_ir import from_proto

        return TorchExecutor(from_proto(proto)).run(dict(zip((entry.name for entry in proto.graph.input), inputs, strict=False)))

    for path in paths:
        try:
            convert(onnx.load(path))
            print(f"{Path(path).name:34s} converted")
        except Exception as error:  # it raises many kinds
            print(f"{Path(path).name:34s} {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    counts: Counter[str] = Counter()
    for case in collect_testcases(None):
        groups = [[onnx.numpy_helper.to_array(one) if isinstance(one, onnx.TensorProto) else one for one in group]
                  for group in case.data_sets[0]]  # fmt: skip
        counts["cases"] += 1
        for name, run in (("onnx2torch", converted), ("executor", executed)):
            try:
                found = run(case.model, groups[0])
                counts[name] += all(map(is_close, found, groups[1]))
            except Exception:  # whatever it is, the case is not computed
                counts[f"{name} fails"] += 1
    print(dict(counts))


def is_close(found: Tensor, expected: np.ndarray) -> bool:
    """Whether they are the same to the suite's tolerance."""
    one, other = (np.asarray(array).astype(np.float64) for array in (found.detach(), expected))
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["vit", "memory", "peer"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--which", default="executor")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.job == "vit":
        vit(args.paths[0], args.batch, args.rounds)
    elif args.job == "memory":
        memory(args.paths[0], args.batch, args.which)
    else:
        peer(args.paths)


if __name__ == "__main__":
    main()
