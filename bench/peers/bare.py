"""The least that trains: a loop over normalised tensors in memory, AdamW in its fastest form, and nothing else."""

import torch
from torch import nn
from torch.nn import functional as F

from bench.peers.clock import Clock, parse
from data_modules.load import load_data
from data_modules.options import DataOptions
from models.classifiers import build_classifier


def main() -> None:
    options = parse()
    clock = Clock(options)
    data = load_data(DataOptions(dataset=options.dataset))
    batch = data.prepare(data.train.gather(torch.arange(len(data.train))), torch.device("cpu"))
    images, labels = batch["inputs"], batch["labels"]
    torch.manual_seed(options.seed)
    train(build_classifier(options.model, "image", 10, tuple(images.shape[1:])), images, labels, options, clock)


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, options, clock: Clock) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0, fused=True)
    while True:
        for indices in torch.randperm(len(labels)).split(options.batch_size):
            loss = F.cross_entropy(model(images[indices]), labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.step()


if __name__ == "__main__":
    main()
