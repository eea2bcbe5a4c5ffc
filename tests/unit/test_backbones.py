"""Models of timm and Transformers. Those that need the libraries are skipped without them."""

import importlib.util
import json

import pytest
import torch

from data_modules.splits import InputSpec
from models.classifiers import build_classifier
from train.classify import ClassifySettings, build_model
from train.engine.errors import UsageError
from train.engine.resume import describe_architecture
from train.engine.settings import check_settings

IMAGES = InputSpec("image", (1, 32, 32))
TEXT = InputSpec("text", vocabulary_size=50, max_length=10)


def needs(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


@pytest.mark.parametrize("name", ["resnet", "mlp:x", "timm:", "hub:bert", ""])
def test_names_that_there_are_not_are_refused(name):
    (problem,) = check_settings(ClassifySettings(model=name))
    assert problem.startswith(f"--model {name}: must be one of mlp, mnist_cnn")


@pytest.mark.parametrize(("name", "library"), [("timm:resnet18", "timm"), ("hf:bert", "transformers")])
def test_a_library_that_is_missing_is_named_with_the_remedy(monkeypatch, name, library):
    inner = importlib.util.find_spec
    there = dict.fromkeys(("timm", "transformers"), True) | {library: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: there[wanted] if wanted in there else inner(wanted))
    (problem,) = check_settings(ClassifySettings(model=name))
    assert problem == f"--model {name}: must be something else, or do: pip install '.[backbones]'"


@pytest.mark.parametrize(("name", "inputs"), [("timm:resnet18", TEXT), ("hf:bert", InputSpec("points", (2,)))])
def test_samples_that_they_do_not_take_are_refused(name, inputs):
    with pytest.raises(UsageError, match=f"{name} does not take {inputs.task} samples"):
        build_model(name, inputs, 3)


@needs("timm")
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_takes_images_of_any_size_and_colour(name):
    model = build_model(f"timm:{name}", IMAGES, 3)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(UsageError, match=r"perhaps you meant.*resnet18"):
        build_model("timm:resnet1x8", IMAGES, 3)


@pytest.fixture
def small(tmp_path):
    """Folders with the settings of small models."""
    from transformers import BertConfig, ViTConfig

    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertConfig(**layers, hidden_dropout_prob=0.0).save_pretrained(tmp_path / "bert")
    ViTConfig(**layers, patch_size=8).save_pretrained(tmp_path / "vit")
    return tmp_path


@needs("transformers")
def test_transformers_take_images_and_texts_and_keep_their_names(small):
    from transformers import BertForSequenceClassification

    images = build_model(f"hf:{small / 'vit'}", IMAGES, 3)
    assert images(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    model = build_model(f"hf:{small / 'bert'}", TEXT, 3).eval()
    assert isinstance(model, BertForSequenceClassification) and "classifier.weight" in model.state_dict()
    tokens = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    short = model(tokens[:1, :3], torch.tensor([3]))
    torch.testing.assert_close(model(tokens, torch.tensor([3, 5]))[:1], short)  # padding says nothing
    with pytest.raises(UsageError, match="cannot be built"):
        build_model("hf:nobody/nothing", IMAGES, 3)


@needs("transformers")
@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        ("vit", InputSpec("image", (1, 4, 4)), r"cannot take an image of shape \(1, 4, 4\)"),
        ("bert", InputSpec("text", vocabulary_size=50, max_length=600), "cannot take texts of 600 tokens"),
        ("bert", IMAGES, "bert does not take image samples"),
        ("vit", TEXT, "vit does not take text samples"),
        ("gone", TEXT, "the folder is not there"),
    ],
)
def test_samples_that_do_not_fit_are_refused_when_the_model_is_built(small, model, inputs, reason):
    with pytest.raises(UsageError, match=reason):
        build_model(f"hf:{small / model}", inputs, 3)


@needs("transformers")
@pytest.mark.parametrize("kind", ["deit", "levit"])
def test_kinds_that_the_library_cannot_build_are_refused(kind):
    with pytest.raises(UsageError, match=f"hf:{kind} cannot be built"):
        build_model(f"hf:{kind}", IMAGES, 3)


@needs("transformers")
@pytest.mark.parametrize(("model", "inputs"), [("bert", TEXT), ("vit", IMAGES)])
def test_a_model_can_be_built_again_without_its_folder(small, model, inputs):
    """A checkpoint keeps the configuration: the file may be gone or others later."""
    name = f"hf:{small / model}"
    built = build_model(name, inputs, 3)
    config = json.loads(json.dumps(describe_architecture(built)))
    (small / model / "config.json").unlink()
    again = build_classifier(name, num_classes=3, config=config, **vars(inputs))
    assert describe_architecture(again) == config
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (built, again)]
    assert shapes[0] == shapes[1]
    with pytest.raises(UsageError, match="the folder is not there"):
        build_model(name, inputs, 3)
