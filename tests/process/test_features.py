"""Options of training, each exact after a kill, or of no influence at all."""

import gzip
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from tests.process.test_resume import SETTINGS

QUICK = {"faults": [("draw_nothing",)]}
# The second save waits for the first: a run that dies after step 5 has one at least.
FINE = [*SETTINGS, "--preflight", "off", "--checkpoint_every", 2, "--max_train_steps"]


@pytest.mark.parametrize("processes", [1, 2])
def test_fine_tuning_goes_on_without_what_it_began_with(classify, processes):
    """A part of the weights is frozen; the run that they come from is deleted before the restart."""
    source = classify.folder / "source"
    classify.run("source", *FINE, 2, "--seed", 1, **QUICK)
    settings = [*FINE, 6, "--init_from", source, "--freeze", "features.*"]
    straight = classify.run("straight", *settings, processes=processes, **QUICK)
    assert "8 of the model's 8 tensors taken" in straight.output
    assert "(18,816 of them frozen)" in straight.output
    began, ended = load(classify.file("source", 2)), load(classify.file("straight", 6))
    for name in ended:
        assert (began[name] == ended[name]).all() == name.startswith("features"), name
    assert not any(name.startswith("features") for name in load(classify.file("straight", 6, "optimizer.safetensors")))

    classify.start("killed", *settings, processes=processes, faults=[("die_after", 5)]).wait()
    shutil.rmtree(source)
    resumed = classify.run("killed", *settings, processes=processes, **QUICK)
    assert "resuming" in resumed.output and "tensors taken" not in resumed.output
    classify.assert_same("straight", "killed", 6)


def test_other_weights_under_the_same_name_are_noticed(classify):
    settings = ["--dataset", "blobs", "--preflight", "off", "--max_train_steps"]
    weights = classify.folder / "weights.safetensors"
    for seed in (0, 1):
        classify.run(f"seed{seed}", *settings, 1, "--seed", seed, **QUICK)
    weights.write_bytes(classify.file("seed0", 1))
    classify.run("run", *settings, 1, "--init_from", weights, **QUICK)
    weights.write_bytes(classify.file("seed1", 1))
    refused = classify.start("run", *settings, 2, "--init_from", weights).wait()
    assert refused.code == 2 and "began with other weights" in refused.output, refused.output
    classify.run("run", *settings, 2, "--init_from", weights, "--allow_changes", "init_from", **QUICK)


def test_what_cannot_be_is_refused_before_anything_is_written(classify):
    foreign = classify.folder / "foreign.safetensors"
    save_file({"weight": np.zeros((2, 2), np.float32)}, foreign)
    refusals = {
        ("--freeze", "feature.*"): "no parameter has such a name",
        ("--init_from", foreign): "none of its 1 tensors fits the model",
    }
    for flags, reason in refusals.items():
        refused = classify.start("run", *flags).wait()
        assert refused.code == 2 and reason in refused.output, refused.output
        assert not (classify.folder / "run").exists()


def test_a_parameter_without_gradient_is_named_where_processes_would_wait_for_it(classify):
    settings = [*FINE, 4]
    refused = classify.start("several", *settings, processes=2, faults=[("leave_unused",)]).wait()
    assert refused.code == 2 and "no gradient reaches 1 of them" in refused.output, refused.output
    assert "--freeze idle" in refused.output and "Traceback" not in refused.output
    classify.run("several", *settings, "--freeze", "idle", processes=2, faults=[("leave_unused",), ("draw_nothing",)])


def test_memory_options_are_exact_and_recomputing_may_be_switched(classify):
    """Blocks with dropout are computed twice in one run; in the other only after the kill."""
    settings = [*FINE, 6, "--channels_last", "--micro_batch_size", 40]
    again = "--gradient_checkpointing"
    classify.run("straight", *settings, again, processes=2, **QUICK)
    classify.start("killed", *settings, processes=2, faults=[("die_after", 5)]).wait()
    finished = classify.run("killed", *settings, again, processes=2, **QUICK)
    assert "changed gradient_checkpointing: False in the checkpoint, True now" in finished.output
    classify.assert_same("straight", "killed", 6)


def test_a_profiled_run_has_the_same_bits(classify):
    classify.run("plain", *FINE, 9, **QUICK)
    finished = classify.run("profiled", *FINE, 9, "--profile", processes=1, **QUICK)
    classify.assert_same("plain", "profiled", 9)
    trace = json.loads(gzip.decompress((classify.folder / "profiled" / "profile" / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"ProfilerStep#{step}" for step in range(4, 8)} <= names
    assert "ProfilerStep#3" not in names and "ProfilerStep#8" not in names
    before, table = finished.output.split("calls a step   operation\n")
    assert "trace.json.gz" in before
    shares = [float(line.split("%")[0]) for line in table.splitlines()[:10]]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100
    assert any("aten::" in line for line in table.splitlines()[:10])
    short = classify.run("profiled", *FINE, 12, "--profile", **QUICK)
    assert "nothing was profiled" in short.output
