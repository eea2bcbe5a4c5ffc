"""What of DeepSpeed is refused at the start, and what launch/deepspeed.yaml asks for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.commands import launch
from accelerate.utils import DistributedType

from train.engine.deepspeed import check_deepspeed, check_installed
from train.engine.errors import UsageError
from train.engine.preflight import preflight

ROOT = Path(__file__).parents[2]


def accelerator(plugin, precision="no", kind=DistributedType.DEEPSPEED):
    return SimpleNamespace(
        distributed_type=kind, mixed_precision=precision, state=SimpleNamespace(deepspeed_plugin=plugin)
    )


def refused(*arguments, **options):
    with pytest.raises(UsageError) as caught:
        check_deepspeed(accelerator(*arguments, **options))
    return str(caught.value)


def test_what_zero_cannot_do_here_is_refused_with_what_to_use_instead():
    assert "zero_stage 3: choose 1 or 2, or FSDP" in refused(DeepSpeedPlugin(zero_stage=3))
    assert "choose none" in refused(DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu"))
    assert "choose bf16" in refused(DeepSpeedPlugin(zero_stage=2), precision="fp16")
    check_deepspeed(accelerator(DeepSpeedPlugin(zero_stage=1), precision="bf16"))


def test_preflight_which_needs_gradients_of_one_process_is_refused():
    state = SimpleNamespace(zero=object())
    with pytest.raises(UsageError, match="--preflight"):
        preflight(SimpleNamespace(settings=None, runtime=None, session=None, state=state))


def test_deepspeed_that_accelerate_would_ignore_is_refused(monkeypatch):
    check_deepspeed(accelerator(None, kind=DistributedType.MULTI_CPU))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "it needs GPUs" in refused(None, kind=DistributedType.MULTI_CPU)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_start_without_the_package_says_what_to_install(tmp_path):
    finished = subprocess.run(
        [sys.executable, "train/classify.py", "--output_dir", tmp_path, "--max_train_steps", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_DEEPSPEED": "true"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2, finished.stderr
    assert "pip install '.[deepspeed]'" in finished.stderr and "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())


def test_only_the_package_that_was_chosen_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="not installed"):
        check_installed()


def test_nothing_imports_deepspeed_that_did_not_choose_it():
    code = "import sys, train.classify, train.engine.training, train.engine.session; print('deepspeed' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "False\n"


def test_the_configuration_for_the_launcher_asks_for_stage_2(monkeypatch):
    arguments = ["--config_file", str(ROOT / "launch/deepspeed.yaml"), "train/classify.py"]
    parsed, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ""
    _, environment = launch.prepare_deepspeed_cmd_env(parsed)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2
    check_deepspeed(accelerator(plugin))
