"""Every recipe is dry-run on its data, and its header says what it must."""

import csv
import random
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.process.conftest import Runs

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "train" / "recipes").glob("*.yaml"))
MNIST = ROOT.parent / "shared" / "data" / "mnist"
ANIMALS = ["ant", "cat", "dog", "horse", "whale", "mouse"]
FILLERS = ["as we all know", "on a sunny day", "some say that", "it is true that", "last year"]


def write_sentences(path, count):
    """Write sentences whose label is the bigger animal: the words alone do not tell, their order does."""
    chance = random.Random(0)
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "label"])
        for _ in range(count):
            one, other = chance.sample(ANIMALS, 2)
            bigger = chance.random() < 0.5
            filler = " ".join(chance.sample(FILLERS, chance.randint(0, 2)))
            word = "bigger" if bigger else "smaller"
            lines.writerow([f"{filler} the {one} is {word} than the {other}", one if bigger else other])
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe(classify, recipe):
    header = recipe.read_text()
    script = re.search(r"accelerate launch train/(\w+)\.py --config", header)[1]
    assert "Hardware and cost:" in header
    assert ("Expected:" in header and "(n = " in header) or "Not run yet:" in header
    values = yaml.safe_load(header)
    dataset = values.get("dataset", "")  # the stateful script makes its data
    if "mnist" in dataset:
        if not MNIST.exists():
            pytest.skip(f"no copy of MNIST in {MNIST.name}/; the recipe is read but not run")
        dataset = MNIST
    if values.get("model") == "simple_lstm":
        dataset = write_sentences(classify.folder / "sentences.csv", 200)  # columns text and label, as on the hub
    if dataset == "images":
        dataset = classify.folder / "images"
        dataset.mkdir()
        for number in range(80):
            noise = random.Random(number).randbytes(3 * 16 * 16)
            Image.frombytes("RGB", (16, 16), noise).save(dataset / f"{number}.png")
    data = ["--dataset", dataset] if dataset else []
    finished = Runs(classify.folder, script).run("run", "--config", recipe, *data, "--dry_run")
    assert ("step 1/1" if data else "val/loss") in finished.output


def test_text_recipe_learns_the_order_of_words(classify):
    data = write_sentences(classify.folder / "sentences.csv", 1200)
    recipe = ROOT / "train" / "recipes" / "text_csv.yaml"
    classify.run("run", "--config", recipe, "--dataset", data)
    assert classify.metrics("run")[-1]["val/accuracy"] > 0.95
