"""train/classify.py at a pace that a test can act on, and with a defect that it asks for.

STEP_SECONDS: seconds that a step takes at least, in the first SLOW_STARTS starts of a job or launcher (default 1).
CRASH_AFTER: a step after which every start ends with an error, once its checkpoint, if one is due, is on the disk.
"""

import os
import time

from train import classify
from train.engine.loop import Loop

STARTS = sum(int(os.environ.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
SLOW = int(os.environ.get("SLOW_STARTS", "1")) > STARTS
SECONDS = float(os.environ.get("STEP_SECONDS", "0")) if SLOW else 0.0
CRASH_AFTER = int(os.environ.get("CRASH_AFTER", "-1"))

step = Loop.step


def paced_step(self, batch):
    if self.state.progress.step == CRASH_AFTER:
        self.runtime.on_main(self.saver.wait)
        raise RuntimeError("the defect that the test asked for")
    time.sleep(SECONDS)
    step(self, batch)


if __name__ == "__main__":
    Loop.step = paced_step
    classify.run()
