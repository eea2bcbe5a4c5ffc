"""The scripts that bench/startup.py starts beside ours, each as its library's examples are written.

    python bench/startup_peers.py plain|accelerate|lightning|trainer [--first FILE] [--max_steps 1] [--help]

All train the same network on images made of noise, as many and as large as the digits, and write FILE when the first
optimizer step is done. A script imports at its top what it needs; here that is the top of its function.
"""

import argparse
import sys
from pathlib import Path

SAMPLES, BATCH, CLASSES = 1259, 64, 10


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--first", type=Path, help="file to write after the first step")
    parser.add_argument("--batch_size", type=int, default=BATCH)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_train_epochs", type=int, default=1)
    return parser.parse_args()


def build_network():
    from torch import nn

    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def plain() -> None:
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    options = parse("plain torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = TensorDataset(torch.randn(SAMPLES, 1, 8, 8), torch.randint(CLASSES, (SAMPLES,)))
    model = build_network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    for images, labels in DataLoader(data, options.batch_size, shuffle=True):
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        options.first.touch()


def accelerate() -> None:
    import torch
    from accelerate import Accelerator
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    options = parse("accelerate")
    accelerator = Accelerator()
    data = TensorDataset(torch.randn(SAMPLES, 1, 8, 8), torch.randint(CLASSES, (SAMPLES,)))
    model = build_network()
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, options.batch_size, shuffle=True))
    for images, labels in loader:
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        options.first.touch()


def lightning() -> None:
    import lightning
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    options = parse("Lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = build_network()

        def training_step(self, batch, _):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def on_train_batch_end(self, *_) -> None:
            options.first.touch()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), options.learning_rate)

    data = TensorDataset(torch.randn(SAMPLES, 1, 8, 8), torch.randint(CLASSES, (SAMPLES,)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=options.num_train_epochs, enable_progress_bar=False, **quiet)
    trainer.fit(Classifier(), DataLoader(data, options.batch_size, shuffle=True))


def trainer() -> None:
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

    parser = HfArgumentParser(TrainingArguments)
    parser.add_argument("--first", type=Path)
    arguments, options = parser.parse_args_into_dataclasses()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build_network()

        def forward(self, images, labels):
            logits = self.network(images)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class First(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            options.first.touch()

    def collate(rows):
        images, labels = zip(*rows)
        return {"images": torch.stack(images), "labels": torch.stack(labels)}

    data = TensorDataset(torch.randn(SAMPLES, 1, 8, 8), torch.randint(CLASSES, (SAMPLES,)))
    Trainer(Classifier(), arguments, collate, data, callbacks=[First()]).train()


SCRIPTS = {"plain": plain, "accelerate": accelerate, "lightning": lightning, "trainer": trainer}

if __name__ == "__main__":
    SCRIPTS[sys.argv.pop(1)]()
