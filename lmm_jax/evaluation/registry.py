"""The table of benchmarks. A further one is one value of `Benchmark` in a file of its own, and its name here."""

from __future__ import annotations

from collections.abc import Iterable

from lmm_jax.errors import UserError
from lmm_jax.evaluation import choice, demo_world, image, judged, video, video_qa, yes_no
from lmm_jax.evaluation.benchmark import Benchmark
from lmm_jax.evaluation.wording import Wording, own

GROUPS = {
    "image": ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seed",
              "llava_bench", "mm_vet"),
    "video": ("videochatgpt_correctness", "videochatgpt_detail", "videochatgpt_context", "videochatgpt_temporal",
              "videochatgpt_consistency", "msvd_qa", "msrvtt_qa", "activitynet_qa", "mvbench", "mlvu", "egoschema"),
}  # fmt: skip


def benchmarks(wording: Wording | None = None) -> dict[str, Benchmark]:
    """All of them by name, in the order of tables.

    Args:
      wording: of what judges are told and of long instructions; None is the one that is shipped.
    """
    wording = wording or own()
    worded = (*judged.benchmarks(wording), *video.benchmarks(wording), *video_qa.benchmarks(wording))
    every = (*image.BENCHMARKS, *yes_no.BENCHMARKS, *choice.BENCHMARKS, *worded, *demo_world.BENCHMARKS)
    table = {benchmark.name: benchmark for benchmark in every}
    first = [name for names in GROUPS.values() for name in names]
    return {name: table[name] for name in (*first, *(name for name in table if name not in first))}


def choose(names: Iterable[str], wording: Wording | None = None) -> list[Benchmark]:
    """The benchmarks with these names; "image" and "video" are groups of them.

    Raises:
      UserError: there is none of that name.
    """
    table, chosen = benchmarks(wording), {}
    for name in names:
        members = GROUPS.get(name, (name,))
        unknown = [member for member in members if member not in table]
        if unknown:
            raise UserError(f"there is no benchmark {name!r}: choose among {', '.join((*GROUPS, *table))}")
        chosen |= {member: table[member] for member in members}
    return list(chosen.values())
