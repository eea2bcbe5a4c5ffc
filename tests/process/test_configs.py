"""The accelerate configs of launch/: each trains on the processes it names, as far as a machine without GPUs shows."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.process.fleet import free_port

ROOT = Path(__file__).parents[2]
YAML_FILES = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "launch").glob("*.yaml"))]
CONFIGS = [path for path in YAML_FILES if "compute_environment" in path.read_text()]
LAUNCH = [f"{Path(sys.executable).parent}/accelerate", "launch", "--config_file"]


class Launch:
    """`accelerate launch --config_file launch/NAME.yaml OPTIONS train/classify.py`, two steps of it."""

    def __init__(self, folder, config, *options, flags=()):
        script = ["train/classify.py", "--tracker", "none", "--preflight", "off", "--max_train_steps", "2", *flags]
        command = [*LAUNCH, config, *options, *script, "--output_dir", folder, "--run_name", "run"]
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait(self):
        """Return exit code and output."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(config):
    load_config_from_file(str(config))


def test_accelerate_refuses_other_keys(tmp_path):
    (tmp_path / "wrong.yaml").write_text(CONFIGS[0].read_text() + "num_proceses: 2\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "processes", "precision"),
    [
        ("launch/cpu.yaml", ["--mixed_precision", "bf16"], 1, "bf16"),
        ("launch/multi_cpu.yaml", [], 2, "fp32"),
        ("launch/single_gpu.yaml", [], 1, "fp32"),
        ("launch/multi_gpu.yaml", ["--num_processes", "2"], 2, "fp32"),
    ],
)
def test_configs_train(tmp_path, config, options, processes, precision):
    code, output = Launch(tmp_path, config, *options).wait()
    assert code == 0, output
    assert f"{processes} process(es)" in output and "test/accuracy" in output
    assert f", {precision}, " in output


@pytest.mark.slow
def test_two_machines_train_together(tmp_path):
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", 2]
    machines = [Launch(tmp_path, "launch/multi_node.yaml", *place, "--machine_rank", rank) for rank in (0, 1)]
    for rank, (code, output) in enumerate(machine.wait() for machine in machines):
        assert code == 0, output
        assert ("2 process(es)" in output) == (rank == 0)  # rank 0 speaks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("accelerate_config.yaml", ["--num_processes", "2"], "told of several processes and started one"),
        ("launch/fsdp2.yaml", ["--num_processes", "2"], "Accelerate would train without it on cpu"),
    ],
)
def test_another_way_than_the_one_asked_for_is_refused(tmp_path, config, options, words):
    code, output = Launch(tmp_path, config, *options).wait()
    assert code != 0 and output.count(words) == 1, output
    assert not list(tmp_path.iterdir())


def test_fsdp2_shards_as_its_config_says(classify):
    config = str(ROOT / "launch" / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(
        ["--config_file", config, "--num_processes", "2", "train/classify.py"]
    )
    arguments, *_ = _validate_launch_command(arguments)
    launched = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith("FSDP_")}
    assert launched["FSDP_VERSION"] == "2" and int(launched["FSDP_MIN_NUM_PARAMS"]) > 0
    launched["FSDP_MIN_NUM_PARAMS"] = "1000"  # the model is small
    settings = ["--model", "mlp", "--max_train_steps", 2, "--checkpoint_every", 1]
    sharded = classify.run("sharded", *settings, processes=2, environment=launched, faults=[("use_fsdp2",)])
    assert "parameters: DTensor; modules computed again: 0; units: 3" in sharded.output, sharded.output


def test_precision_that_the_machine_lacks_is_refused(classify):
    for precision in ("fp16", "fp8"):
        finished = classify.start("run", "--mixed_precision", precision).wait()
        assert finished.code == 2 and f"{precision}" in finished.output, finished.output
        assert not (classify.folder / "run").exists()
