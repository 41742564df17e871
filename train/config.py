"""What a run is made of: frozen dataclasses, every field of which can be set on the command line.

Facts: spec sections 8, 10 and 11. A file in `configs/` has one function, ``get_config() -> TrainConfig``.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from lmm_jax.config import ASPECT_RATIOS, REMAT, TEMPLATES, ModelConfig
from lmm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One file of conversations.

    Attributes:
      file: LLaVA JSON or JSONL, or Video-ChatGPT's list of questions and answers.
      media: folder that the records' pictures and videos are relative to; "" is the folder of `file`.
      sampling: which records: all, first:1000, first:10%, end:1000, random:999, random:10%.
    """

    file: str
    media: str = ""
    sampling: str = "all"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and in which batches.

    Attributes:
      mixture: YAML list of sources (file, media, sampling); "" when `sources` names them.
      sources: in place of a YAML file, or besides it.
      template: prompt template; "" takes the model's own (spec section 8).
      batch_size: rows of a global batch (all hosts, all accumulated parts).
      epochs: passes over the data.
      max_length: decoder positions of a row, vision tokens included; longer records are skipped and counted.
      buckets: lengths that rows are padded to, ascending; `max_length` is always the last.
      video_frames: frames taken of a video.
      seed: of the order of records.
      max_skipped: share of records that may be unusable before the run stops.
      threads: that read and decode media, per process.
      prefetch: batches decoded ahead, per process.
      cache: folder for tokenised lengths; "" is `.cache` in the run's folder.
    """

    mixture: str = ""
    sources: tuple[SourceConfig, ...] = ()
    template: Literal["", *TEMPLATES] = ""  # type: ignore[valid-type]
    batch_size: int = 256
    epochs: int = 1
    max_length: int = 4096
    buckets: tuple[int, ...] = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
    video_frames: int = 8
    seed: int = 0
    max_skipped: float = 0.01
    threads: int = 16
    prefetch: int = 4
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The model a run starts from.

    Attributes:
      folder: a model folder; its compressor and pre-fusion layers are kept unless the fields below say otherwise.
      size: named sizes that the model in `folder` has, so that a run can be planned before it is there.
      scratch: sizes of a model to initialise at random, in place of `folder`.
      tokenizer: folder with tokenizer files, for `scratch`.
      compressor_size: C of a compressor to add where the model has none; None adds none.
      prefusion_layers: number of pre-fusion layers to add where the model has none; None adds none.
      prefusion_init: how added pre-fusion layers start (spec section 10).
      resolution_ratio: tiles along one side of a picture; None leaves it.
      image_aspect_ratio: how pictures are made square; "" leaves it.
      template: prompt template of the trained model; "" leaves it.
      seed: of new weights.
    """

    folder: str = ""
    size: str = ""
    scratch: ModelConfig | None = None
    tokenizer: str = ""
    compressor_size: int | None = None
    prefusion_layers: int | None = None
    prefusion_init: Literal["random", "llm_first_layers", "identity"] = "llm_first_layers"
    resolution_ratio: int | None = None
    image_aspect_ratio: Literal["", *ASPECT_RATIOS] = ""  # type: ignore[valid-type]
    template: Literal["", *TEMPLATES] = ""  # type: ignore[valid-type]
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters that are treated alike.

    Attributes:
      pattern: regular expression that the whole path of a parameter matches, as ``mm_projector/.*``.
      learning_rate: peak; None where the parameters are frozen: no gradient, no optimiser state.
      weight_decay: decoupled, as AdamW's.
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser with warm-up and cosine decay.

    Attributes:
      groups: every parameter belongs to exactly one; otherwise the run does not start and all offenders are listed.
      warmup: share of all steps.
      final: learning rate at the end, as a share of the peak.
      clip: largest global gradient norm; 0 for none.
      b1, b2, eps: of AdamW.
      accumulation: parts that a global batch is computed in, one after the other.
      method: "adamw", as published; "muon" for the matrices inside layers, AdamW for all else: far fewer samples from scratch.
    """

    groups: tuple[GroupConfig, ...] = ()
    warmup: float = 0.03
    final: float = 0.0
    clip: float = 0.5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    accumulation: int = 1
    method: Literal["adamw", "muon"] = "adamw"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the decoder's projections, merged when a model folder is written; rank 0 is none."""

    rank: int = 0
    alpha: float = 16.0
    targets: str = r"layers/.*_proj"  # regular expression over paths of projections


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Devices, number formats and memory.

    Attributes:
      mesh: as ``data=1,fsdp=8,tensor=1``; "" puts all devices on fsdp.
      dtype: of arithmetic; "" is bfloat16 on TPU and GPU, float32 on CPU.
      trained_dtype: in which trained parameters (and the optimiser's moments) are kept.
      frozen_dtype: in which frozen parameters are kept; "" is `dtype`.
      remat: what the backward pass computes again: nothing; whole layers ("full"); all but attention's result; all but that
        and the projections around it ("narrow"); all but matrix products and attention ("dots").
      loss_chunk: labelled positions of a row that meet the vocabulary at once.
      attention: kernel, one of `models.attention.IMPLEMENTATIONS`.
      xla_flags: for compiling the step, as ``xla_name=value``, beside or in place of those of `train.xla`; ``xla_name=`` is
        left out.
    """

    mesh: str = ""
    dtype: Literal["", "float32", "bfloat16"] = ""
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: Literal["", "float32", "bfloat16"] = ""
    remat: Literal[*REMAT] = "full"  # type: ignore[valid-type]
    loss_chunk: int = 256
    attention: str = "auto"
    xla_flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Held-out records, looked at while training.

    Attributes:
      mixture, sources: as those of the training data; none: no evaluation.
      every: steps between two evaluations; 0: at the end only.
      batches: of them that are looked at.
      answers: questions that are answered in words and logged.
    """

    mixture: str = ""
    sources: tuple[SourceConfig, ...] = ()
    every: int = 500
    batches: int = 8
    answers: int = 4


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What a run leaves behind.

    Attributes:
      checkpoint_steps: steps between two checkpoints; 0: only at the end, or when the run is asked to stop.
      checkpoint_minutes: minutes between two checkpoints, besides; 0: by steps alone.
      keep: checkpoints that stay.
      log_steps: steps between two lines of metrics.
      bucket: gs://… for checkpoints and the model, in place of the run's folder; "": none.
      model_dtype: of trained parameters in the model folder that is written; "" is that of arithmetic.
      wandb: project at Weights & Biases, where that package is installed; "": none.
      profile: first step and number of steps that `jax.profiler` traces; none by default.
    """

    checkpoint_steps: int = 500
    checkpoint_minutes: float = 0.0
    keep: int = 2
    log_steps: int = 10
    bucket: str = ""
    model_dtype: Literal["", "float32", "bfloat16"] = ""
    wandb: str = ""
    profile: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. Everything it writes lies in `folder`: checkpoints, metrics, the report of skipped records, `model/`.

    With `record.bucket`, checkpoints and `model/` lie there, and `folder` need not be the same for all hosts.
    """

    folder: str
    start: StartConfig = StartConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    compute: ComputeConfig = ComputeConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    record: RecordConfig = RecordConfig()
    max_steps: int | None = None  # stop earlier than the epochs say; the schedule ends there too

    def __post_init__(self) -> None:
        _check(self)

    @property
    def kept_in(self) -> str:
        """Where checkpoints and the model are kept."""
        return self.record.bucket or self.folder


def _check(c: TrainConfig) -> None:
    d, o, faults = c.data, c.optimizer, []
    if d.batch_size < 1 or o.accumulation < 1 or d.batch_size % o.accumulation:
        faults.append(f"batch_size {d.batch_size} is not a multiple of accumulation {o.accumulation}")
    if d.epochs < 1 or d.max_length < 2 or d.video_frames < 1:
        faults.append("epochs, max_length and video_frames must be positive")
    if list(d.buckets) != sorted(set(d.buckets)) or any(b < 2 for b in d.buckets):
        faults.append(f"buckets {d.buckets} do not ascend")
    if d.threads < 1 or d.prefetch < 1 or d.seed < 0 or c.start.seed < 0:
        faults.append("threads and prefetch must be positive, seeds not negative")
    if o.method not in ("adamw", "muon"):
        faults.append(f"method {o.method!r} is neither adamw nor muon")
    if not 0 <= d.max_skipped <= 1:
        faults.append(f"max_skipped {d.max_skipped} is no share between 0 and 1")
    if not 0 <= o.warmup <= 1 or not 0 <= o.final <= 1:
        faults.append("warmup and final are shares between 0 and 1")
    if bool(c.start.folder) == (c.start.scratch is not None):
        faults.append("a run starts either from start.folder, a model folder, or from start.scratch")
    if c.start.prefusion_layers is not None and c.start.prefusion_layers < 0:
        faults.append(f"prefusion_layers {c.start.prefusion_layers} is negative")
    if c.compute.loss_chunk < 1 or c.record.log_steps < 1 or c.record.keep < 1:
        faults.append("loss_chunk, log_steps and keep must be positive")
    if c.max_steps is not None and c.max_steps < 1:
        faults.append(f"max_steps {c.max_steps} is not positive")
    if "://" in c.folder + d.cache or (c.record.bucket and not c.record.bucket.startswith("gs://")):
        faults.append("folder and data.cache are on this machine, record.bucket is gs://bucket/folder or nothing")
    if faults:
        raise UserError("this run cannot work: " + "; ".join(faults))


def to_json(config: TrainConfig) -> dict[str, Any]:
    """A plain form for records and for telling whether a run is continued with other settings."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
