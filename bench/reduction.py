"""What --reduction exact costs against DistributedDataParallel, in one run.

    python bench/reduction.py --processes 2 --repeats 5

Trains mnist_cnn (1.2 million parameters on 28 x 28 images made of noise) with both reductions in turn and compares the
samples per second of the later half of each run. Prints a Markdown table.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 60
SCRIPT = Path(__file__).parents[1] / "train" / "classify.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-reduction-") as folder:
        data = Path(folder) / "train.parquet"
        _make_images(data)
        print("| processes | slots | reduction | median samples/s | least to most | ratio to fast |")
        print("|---|---|---|---|---|---|")
        for slots in options.slots:
            speeds: dict[str, list[float]] = {"fast": [], "exact": []}
            for repeat in range(options.repeats):
                for reduction, seen in speeds.items():
                    run = f"{slots}-{reduction}-{repeat}"
                    seen.append(_train(Path(folder), data, run, options.processes, slots, reduction))
            for reduction, seen in speeds.items():
                ratio = statistics.median(mine / fast for mine, fast in zip(seen, speeds["fast"]))
                print(
                    f"| {options.processes} | {slots} | {reduction} | {statistics.median(seen):,.0f} | "
                    f"{min(seen):,.0f} to {max(seen):,.0f} | {ratio:.2f} |",
                    flush=True,
                )


def _make_images(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    source = random.Random(0)
    rows = []
    for number in range(2000):
        buffer = io.BytesIO()
        Image.frombytes("L", (28, 28), source.randbytes(784)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": number % 10})
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "int64"}}}}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)


def _train(folder: Path, data: Path, run: str, processes: int, slots: int, reduction: str) -> float:
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(processes)]
    command += [str(SCRIPT), "--dataset", str(data), "--model", "mnist_cnn", "--batch_size", "128", "--tracker", "none"]
    command += ["--slots", str(slots), "--reduction", reduction, "--output_dir", str(folder), "--run_name", run]
    command += ["--max_train_steps", str(STEPS), "--num_train_epochs", "99", "--eval_every", "99 epochs"]
    command += ["--log_every", str(STEPS // 4), "--checkpoint_every", "99 epochs"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["perf/samples_per_second"] for line in lines if "perf/samples_per_second" in line]
    return statistics.median(speeds[len(speeds) // 2 :])


if __name__ == "__main__":
    main()
