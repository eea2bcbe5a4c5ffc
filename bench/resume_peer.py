"""The script that bench/resume.py starts beside ours: accelerate's way to go on within an epoch.

    python bench/resume_peer.py --data FILE.parquet --state FOLDER --position 0 [--streaming] [--first FILE | --save]

Reads the samples with `datasets`, loads what `save_state` wrote, and skips batches with `skip_first_batches`, as
accelerate's example of checkpointing does.
"""

import argparse
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, skip_first_batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True)
parser.add_argument("--state", required=True)
parser.add_argument("--position", type=int, default=0, help="batches of the epoch that were used")
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--streaming", action="store_true")
parser.add_argument("--first", type=Path, help="file to write after the first step")
parser.add_argument("--save", action="store_true", help="write the state after a step, for later starts")
options = parser.parse_args()

datasets.disable_progress_bars()
accelerator = Accelerator()
rows = datasets.load_dataset("parquet", data_files=options.data, split="train", streaming=options.streaming)
rows = rows.with_format("torch")
if options.streaming:
    rows = rows.shuffle(seed=0, buffer_size=10_000)
loader = DataLoader(rows, options.batch_size, shuffle=not options.streaming)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
if not options.save:
    accelerator.load_state(options.state)
for batch in skip_first_batches(loader, options.position):
    accelerator.backward(F.cross_entropy(model(batch["inputs"]), batch["label"]))
    optimizer.step()
    optimizer.zero_grad()
    if options.save:
        accelerator.save_state(options.state)
        break
    options.first.touch()
