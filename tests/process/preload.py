"""Imported once by the server that ranks are forked from; importing it must start no thread and compute nothing."""

import accelerate  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch.distributed.tensor  # noqa: F401

import data_modules.embedded
import data_modules.loader  # noqa: F401
import models.cnn
import models.mlp  # noqa: F401
import train.classify
import train.engine.loop  # noqa: F401
