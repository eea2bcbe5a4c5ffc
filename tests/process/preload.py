"""Imported once by the server that ranks are forked from; importing it must start no thread and compute nothing."""
# ruff: noqa: F401

import contextlib

import accelerate
import matplotlib.backends.backend_agg
import matplotlib.figure
import PIL.ImageDraw
import pyarrow.csv
import pyarrow.parquet
import sklearn.metrics
import tokenizers
import torch
import torch._dynamo
import torch.distributed.tensor

import data_modules.frequency
import data_modules.load
import data_modules.look
import data_modules.training_loader
import models.autoencoder
import models.cnn
import models.frequency_lstm
import models.losses
import models.lstm
import models.mlp
import train.classify
import train.engine.gallery
import train.engine.loop
import train.evaluate
import train.evaluation.new_samples
import train.evaluation.results
import train.predict
import train.reconstruct
import train.stateful.choice
import train.stateful.loop
import train.stateful.report
import train.stateful_lstm

with contextlib.suppress(ImportError):  # only one of the engines needs it
    import numba
