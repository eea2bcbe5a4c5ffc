"""The script of a lab course, torch only: all images decoded first, then a DataLoader and Adam."""

from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from bench.peers.clock import Clock, parse
from bench.peers.mnist import build, decode, score


def main() -> None:
    options = parse()
    clock = Clock(options)
    train = TensorDataset(*decode(options.dataset, "train"))
    batches = DataLoader(train, options.batch_size, shuffle=True, num_workers=options.num_workers)
    model = build(options.seed)
    test = None if options.steps else DataLoader(TensorDataset(*decode(options.dataset, "test")), 512)
    optimizer = Adam(model.parameters(), lr=1e-3)
    every, steps = options.eval_every // options.batch_size, 0
    for _ in range(options.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            clock.step()
            steps += 1
            if test is not None and steps % every == 0:
                model.eval()
                clock.evaluated(steps * options.batch_size, score(model, test))
                model.train()


if __name__ == "__main__":
    main()
