"""In the way of accelerate's vision examples: `datasets` with a transform, DataLoader, accelerator.prepare."""

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader
from tqdm import tqdm

from bench.peers.clock import Clock, parse
from bench.peers.mnist import build, load_rows


def main() -> None:
    options = parse()
    clock = Clock(options)
    accelerator = Accelerator(cpu=True)
    set_seed(options.seed)
    workers = {"num_workers": options.num_workers}
    train = DataLoader(load_rows(options.dataset, "train", "image"), options.batch_size, shuffle=True, **workers)
    test = DataLoader(load_rows(options.dataset, "test", "image"), 512, **workers)
    model = build(options.seed)
    optimizer = Adam(model.parameters(), lr=1e-3)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    every, steps = options.eval_every // options.batch_size, 0
    bar = tqdm(total=options.epochs * len(train))
    for _ in range(options.epochs):
        model.train()
        total_loss = 0
        for batch in train:
            loss = F.cross_entropy(model(batch["image"]), batch["labels"])
            total_loss += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            clock.step()
            steps += 1
            if not options.steps and steps % every == 0:
                clock.evaluated(steps * options.batch_size, evaluate(accelerator, model, test))


def evaluate(accelerator, model, test) -> float:
    import torch

    model.eval()
    right = count = 0
    for batch in test:
        with torch.no_grad():
            predictions = model(batch["image"]).argmax(dim=-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        right += (predictions == labels).sum().item()
        count += len(labels)
    model.train()
    return right / count


if __name__ == "__main__":
    main()
