"""What the compiled step of stage 1 keeps at full size, read off the program; nothing is allocated."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from batches import STAGE_1, split

import dataclasses
from lmm_jax import sharding
from lmm_jax.config import named_sizes
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from train.config import OptimizerConfig
from train.optimizer import make_optimizer
from train.step import TrainState, train_step

ROWS, LENGTH, LABELS = 8, 640, 48
