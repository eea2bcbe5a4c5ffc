"""Lightning with its defaults: a LightningModule, a Trainer, logging and a progress bar; Parquet through `datasets`."""

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bench.peers.clock import Clock, parse
from bench.peers.mnist import build, load_rows


class Classifier(lightning.LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = build(seed)

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.model(batch["image"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        logits = self.model(batch["image"])
        right = (logits.argmax(dim=1) == batch["labels"]).float().mean()
        self.log("accuracy", right, prog_bar=True, batch_size=len(logits))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Told(lightning.Callback):
    def __init__(self, clock: Clock, batch_size: int) -> None:
        self.clock, self.batch_size = clock, batch_size

    def on_train_batch_end(self, *_) -> None:
        self.clock.step()

    def on_validation_end(self, trainer, _) -> None:
        if not trainer.sanity_checking:
            accuracy = trainer.callback_metrics["accuracy"].item()
            self.clock.evaluated(trainer.global_step * self.batch_size, accuracy)


def main() -> None:
    options = parse()
    clock = Clock(options)
    lightning.seed_everything(options.seed)
    workers = {"num_workers": options.num_workers}
    train = DataLoader(load_rows(options.dataset, "train", "image"), options.batch_size, shuffle=True, **workers)
    test = None
    if not options.steps:
        test = DataLoader(load_rows(options.dataset, "test", "image"), 512, **workers)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        val_check_interval=options.eval_every // options.batch_size,
        check_val_every_n_epoch=None,  # counted over the epochs
        default_root_dir=options.folder,
        callbacks=[Told(clock, options.batch_size)],
    )
    trainer.fit(Classifier(options.seed), train, test)


if __name__ == "__main__":
    main()
