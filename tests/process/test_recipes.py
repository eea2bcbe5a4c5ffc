"""Every recipe is dry-run on its data, and its header says what it must."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "train" / "recipes").glob("*.yaml"))
MNIST = ROOT.parent / "shared" / "data" / "mnist"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe(classify, recipe):
    header = recipe.read_text()
    for part in ("accelerate launch train/classify.py --config", "Hardware and cost:", "Expected:", "(n = "):
        assert part in header
    dataset = yaml.safe_load(header)["dataset"]
    if "mnist" in dataset:
        if not MNIST.exists():
            pytest.skip(f"no copy of MNIST in {MNIST.name}/; the recipe is read but not run")
        dataset = MNIST
    finished = classify.run("run", "--config", recipe, "--dataset", dataset, "--dry_run")
    assert "step 1/1" in finished.output
