"""A video of hours, end to end, and where its time goes:

    python benchmarks/long_video.py                                      the demo model's sizes, on this machine
    python benchmarks/long_video.py --size llava-mini-llama-3.1-8b --dtype bfloat16 --memory 24      on a GPU, of whose memory
                                                                         no more than 24 GB may be taken
    python benchmarks/long_video.py --size llava-mini-llama-3.1-8b --dtype bfloat16 --compile v6e:2x2

The first two make a video file, 10,000 seconds at 10 frames a second, and random weights; they ask about it at one frame a
second, and measure how many frames a second each stage does alone: decoding the file, copying to the device, computing. The
third runs nothing: it compiles all programs for a device (a TPU topology, which needs libtpu and no TPU; or "here") and tells
what it would hold, and which fused attention kernels stand in each. Each prints a table and adds its figures to
benchmarks/long_video.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_suffix(".json")
RATE, TEXT, NEW = 10, 45, 16  # frames a second of the file, tokens of the question and of the answer


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="demo", help="named sizes of a model (demo)")
    parser.add_argument("--frames", type=int, default=10000, help="that are looked at (10000)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of arithmetic (float32)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights in so many bits")
    parser.add_argument("--kv-cache", choices=("bfloat16", "int8"), help="what keys and values are kept in (as computed)")
    parser.add_argument("--memory", type=float, metavar="GB", help="take no more of the GPU's memory")
    parser.add_argument("--compile", metavar="WHERE", help="compile only, for a topology as v5e:2x2, or here")
    args = parser.parse_args()
    if args.memory:
        total = subprocess.check_output(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], text=True)
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{args.memory * 1e9 / (float(total.split()[0]) * 2**20):.4f}"
    if args.compile and args.compile != "here":
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    figures = compiled(args) if args.compile else measured(args)
    from machine import machine

    told = {k: v for k, v in vars(args).items() if v is not None}
    figures |= {"machine": machine("jax", "jaxlib", "flax"), "date": datetime.date.today().isoformat()}
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[" ".join(f"{k}={v}" for k, v in told.items())] = figures
    RESULT.write_text(json.dumps(kept, indent=2) + "\n")


def config_of(size: str, frames: int) -> Any:
    """Sizes of a model, with a context that holds so many frames."""
    from lmm_jax import checkpoint
    from lmm_jax.config import named_sizes
    from lmm_jax.demo import MODEL

    sizes = named_sizes() | {"demo": checkpoint.read_config(MODEL)}
    if size not in sizes:
        sys.exit(f"there are no sizes {size}: choose one of {', '.join(sizes)}")
    decoder = sizes[size].decoder
    context = max(decoder.max_position_embeddings, frames * sizes[size].tokens_per_image + TEXT + NEW)
    return dataclasses.replace(sizes[size], decoder=dataclasses.replace(decoder, max_position_embeddings=context))


def request(video: Any) -> Any:
    """A question about a video."""
    import numpy as np

    from lmm_jax.config import IMAGE_TOKEN_ID
    from lmm_jax.inference.engine import Request
    from lmm_jax.inference.sampling import Sampling

    ids = np.arange(10, 10 + TEXT + 1, dtype=np.int32)
    ids[5] = IMAGE_TOKEN_ID
    return Request(ids, [video], Sampling(NEW))


class Frames:
    """A video whose frames are all the same, in memory already."""

    def __init__(self, pixels: Any, count: int) -> None:
        """Pixels (P,H,W,3)."""
        self.pixels, self.count = pixels, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self.pixels for _ in range(self.count))


# ---- compiled --------------------------------------------------------------------------------------------------------


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """What a device would hold."""
    import numpy as np
    from jax.experimental import topologies

    from lmm_jax import sharding
    from lmm_jax.analysis.rehearsal import rehearse

    config, devices = config_of(args.size, args.frames), None
    if args.compile != "here":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.compile).devices[:1]
    side = config.vision.image_size
    video = Frames(np.zeros((1, side, side, 3), np.uint8), args.frames)
    found = rehearse(
        config,
        [request(video)],
        sharding.make_mesh(None, devices),
        dtype=args.dtype,
        quantize=args.quantize,
        kv_cache=args.kv_cache,
    )
    print("| program | runs | temporaries, GB | all that is alive, GB | attention kernels |\n|---|---|---|---|---|")
    for p in found.programs:
        print(f"| {p.name} | {p.runs} | {p.temporaries / 1e9:.2f} | {p.peak / 1e9:.2f} | {', '.join(kernels(p.text))} |")
    print(f"\nparameters {found.parameters / 1e9:.2f} GB, at most {found.peak / 1e9:.2f} GB")
    used = {p.name: kernels(p.text) for p in found.programs if kernels(p.text)}
    return {"parameter_bytes": found.parameters, "peak_bytes": found.peak, "attention_kernels": used}


def kernels(program: str) -> list[str]:
    """Names of the fused attention kernels that a compiled program calls: splash on a TPU, cuDNN's on a GPU."""
    return sorted(set(re.findall(r"splash\w+|__cudnn\$fmha\w+", program)))


# ---- measured --------------------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Frames per second of each stage and of all together; memory."""
    import jax
    import numpy as np

    from lmm_jax import sharding
    from lmm_jax.data.video import stream_frames
    from lmm_jax.inference.engine import Engine

    config, mesh = config_of(args.size, args.frames), sharding.make_mesh()
    engine = Engine(config, random_params(config, mesh, args), mesh, dtype=args.dtype, kv_cache=args.kv_cache)
    side = config.vision.image_size
    pixels = np.zeros((1, side, side, 3), np.uint8)
    chunk = np.zeros((32, *pixels.shape), np.uint8)
    jax.device_put(chunk).block_until_ready()
    engine.generate([request(Frames(pixels, args.frames))], ())  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds: dict[str, float] = {}

    def timed(stage: str) -> Any:
        start = time.perf_counter()
        return lambda: seconds.update({stage: time.perf_counter() - start})

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.mp4"
        write_video(file, args.frames, side)
        stop = timed("decoding the file")
        decoded = sum(1 for _ in stream_frames(file, size=side))
        stop()
        stop = timed("copying to the device")
        for _ in range(args.frames // len(chunk)):
            jax.device_put(chunk).block_until_ready()
        stop()
        stop = timed("computing, to the first token")
        next(engine.stream(request(Frames(pixels, args.frames)), ()))
        stop()
        stop = timed("all, file to first token")
        with stream_frames(file, size=side) as frames:
            next(engine.stream(request(Tiled(frames)), ()))
        stop()
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print("| stage | frames a second |\n|---|---|")
    for stage, took in seconds.items():
        print(f"| {stage} | {args.frames / took:.0f} |")
    print(f"\n{decoded} frames; the process grew by {grown / 1e6:.0f} MB while they were decoded and looked at")
    if peak:
        print(f"the device held {peak / 1e9:.2f} GB at most")
    return {
        "frames_per_second": {stage: args.frames / took for stage, took in seconds.items()},
        "grown_bytes": grown,
        "device_peak_bytes": peak,
        "device": jax.local_devices()[0].device_kind,
    }


class Tiled:
    """Frames (H,W,3) as the engine takes them, one tile each."""

    def __init__(self, frames: Any) -> None:
        """Takes a `FrameStream`."""
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Any]:
        return (frame[None] for frame in self.frames)


def random_params(config: Any, mesh: Any, args: argparse.Namespace) -> Any:
    """A leaf at a time, so that no more memory is taken than the weights need."""
    import jax

    from lmm_jax.models import quantization
    from lmm_jax.models.llava_mini import abstract_params
    from lmm_jax.sharding import leaf_paths

    abstract = abstract_params(config, mesh, args.dtype)
    made = []
    for number, (path, leaf) in enumerate(leaf_paths(abstract).items()):

        def make(key: Any, leaf: Any = leaf) -> Any:
            return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

        value = jax.jit(make, out_shardings=leaf.sharding)(jax.random.key(number))
        made.append(quantization.quantize_leaf(path, value, args.quantize) if args.quantize else value)
    return jax.tree.unflatten(jax.tree.structure(abstract), made)


def write_video(file: Path, seconds: int, side: int) -> None:
    """A grey picture that grows lighter and darker, with a key frame every ten seconds."""
    import av
    import numpy as np

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(10 * RATE)}
        ramp = np.arange(side, dtype=np.uint8)
        for number in range(seconds * RATE):
            grey = np.broadcast_to(ramp + np.uint8(number % 256), (side, side))
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, axis=2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
