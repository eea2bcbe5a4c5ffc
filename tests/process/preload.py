"""Imported once by the server that ranks are forked from; importing it must start no thread and compute nothing."""
# ruff: noqa: F401

import accelerate
import matplotlib.backends.backend_agg
import matplotlib.figure
import sklearn.datasets
import torch
import torch._dynamo
import torch.distributed.tensor

import data_modules.embedded
import data_modules.images
import data_modules.loader
import models.cnn
import models.mlp
import train.classify
import train.engine.loop
