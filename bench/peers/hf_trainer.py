"""Hugging Face's Trainer with its defaults but for the optimizer's; Parquet through `datasets`."""

from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.peers.clock import Clock, parse
from bench.peers.mnist import build, load_rows


class Classifier(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = build(seed)

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Told(TrainerCallback):
    def __init__(self, clock: Clock, batch_size: int) -> None:
        self.clock, self.batch_size = clock, batch_size

    def on_step_end(self, *_, **__) -> None:
        self.clock.step()

    def on_evaluate(self, arguments, state, control, metrics, **_) -> None:
        self.clock.evaluated(state.global_step * self.batch_size, metrics["eval_accuracy"])


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    options = parse()
    clock = Clock(options)
    arguments = TrainingArguments(
        output_dir=options.folder,
        use_cpu=True,
        seed=options.seed,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=512,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        eval_strategy="no" if options.steps else "steps",
        eval_steps=options.eval_every // options.batch_size,
        dataloader_num_workers=options.num_workers,
        remove_unused_columns=False,
        report_to=[],
    )
    Trainer(
        Classifier(options.seed),
        arguments,
        train_dataset=load_rows(options.dataset, "train", "pixel_values"),
        eval_dataset=load_rows(options.dataset, "test", "pixel_values"),
        compute_metrics=accuracy,
        callbacks=[Told(clock, options.batch_size)],
    ).train()


if __name__ == "__main__":
    main()
