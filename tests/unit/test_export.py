"""train/export.py in this process: every kind of run, its preprocessing inside the graph, and what is refused."""

import base64
import dataclasses
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data_modules.options import DataOptions
from tests.unit.test_evaluate import train, write_images, write_people
from train import classify, export, reconstruct, stateful_lstm
from train.engine.errors import UsageError
from train.evaluation import formats as formats_module
from train.evaluation.formats import FILES, FORMATS, open_format
from train.evaluation.graph import build_graph
from train.evaluation.graph_samples import load_real_samples
from train.evaluation.samples import encode_rows, open_rows
from train.evaluation.trained_run import build_model, open_run, restore_reader

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the script in this process; return exit code, lines of output and lines of errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            export.run()
        printed = capsys.readouterr()
        return caught.value.code, printed.out.splitlines(), printed.err.splitlines()

    return call


def classified(folder, name, dataset, **settings):
    settings = {"num_train_epochs": 2, "learning_rate": 1e-2, **settings}
    return train(classify, classify.ClassifySettings, folder, name, dataset=str(dataset), **settings)


@pytest.fixture(scope="module")
def digits(folder):
    return classified(folder, "digits", "digits")


@pytest.fixture(scope="module")
def people(folder):
    """A run on a table with large numbers, some missing, and categories."""
    file = write_people(folder / "people.csv", 120)
    lines = file.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    year = ["" if number % 7 == 0 else str(2**40 + 10 * number) for number in range(len(rows))]
    lines = ["age,town,year,label", *(f"{age},{town},{y},{label}" for (age, town, label), y in zip(rows, year))]
    file.write_text("\n".join(lines) + "\n")
    return classified(folder, "people", file, categorical_columns=("town",), num_train_epochs=10), file


@pytest.fixture(scope="module")
def texts(folder):
    file = folder / "texts.csv"
    words = {"good": "a very good and fine film", "bad": "bad , dull and far too long"}
    lines = [f'"{words[label]} {"x " * (number % 13)}",{label}' for number in range(40) for label in words]
    file.write_text("text,label\n" + "\n".join(lines) + "\n")
    return classified(folder, "texts", file)


def exported(command, run):
    """Export a run; return where, and config.json."""
    code, out, errors = command(run)
    assert (code, errors) == (0, []), (out, errors)
    written = run.__class__(out[-1].removeprefix("wrote "))
    return written, json.loads((written / "config.json").read_text())


def assert_both_answer(written, inputs, expected):
    """Both files give, for inputs by name, what the model gives."""
    for kind in FORMATS:
        got = open_format(written / FILES[kind])(inputs)
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other.detach(), rtol=2e-5, atol=2e-5)


def with_probabilities(logits):
    return logits, torch.softmax(logits, dim=1)


def test_images_are_normalised_inside_in_batches_of_any_size(digits, command):
    written, config = exported(command, digits)
    assert {file.name for file in written.iterdir()} == {
        "README.md", "config.json", "model.onnx", "model.pt2", "model.safetensors", "preprocessing.json",
    }  # fmt: skip
    assert not list(written.parent.glob(".tmp-*"))
    run = open_run(str(digits), "best")
    model, normalization = build_model(run), restore_reader(run)[1]
    normalization = dataclasses.replace(normalization, scale=1 / 16)  # of the scans, not of files
    for count in (1, 5):
        images = torch.randint(0, 17, (count, 1, 8, 8), dtype=torch.uint8)
        assert_both_answer(written, {"images": images}, with_probabilities(model(normalization.apply(images))))
    assert config["inputs"] == {"images": {"dtype": "uint8", "shape": ["batch", 1, 8, 8]}}
    assert config["check"]["difference"].keys() == {"onnx", "pt2"} and config["scores"]["val/accuracy"] > 0.5
    weights = load_file(written / "model.safetensors")
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())
    card = (written / "README.md").read_text()
    assert "Pixels are 0 to 16" in card and "output_dir" not in card


def test_the_card_shows_code_that_runs(digits, command, monkeypatch):
    written, _ = exported(command, digits)
    code = (written / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(written)
    names = {}
    exec(code, names)
    assert [values.shape for values in names["answers"]] == [(1, 10), (1, 10)]


def test_tables_are_filled_flagged_and_standardised_inside(people, command, tmp_path):
    run_folder, _ = people
    written, config = exported(command, run_folder)
    assert config["columns"]["numbers"] == ["age", "year"]
    (town,) = config["columns"]["categories"]
    assert town["codes"] == {"01": 1, "02": 2, "03": 3} and town["unknown"] == 0
    cells = [("31.5", "02", str(2**40 + 123)), ("", "03", ""), ("12", "elsewhere", str(2**40 + 700))]
    file = tmp_path / "new.csv"
    file.write_text("age,town,year\n" + "\n".join(",".join(row) for row in cells) + "\n")
    run = open_run(str(run_folder), "best")
    (rows,) = open_rows(run, DataOptions(dataset=str(file))).values()
    batch = encode_rows(run, rows).gather(torch.arange(3))
    expected = with_probabilities(build_model(run)(batch["numbers"], batch["categories"]))
    numbers = [[float(cell or "nan") for cell in (age, year)] for age, _, year in cells]
    inputs = {
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "categories": torch.tensor([[town["codes"].get(name, 0)] for _, name, _ in cells]),
    }
    assert_both_answer(written, inputs, expected)


def test_texts_take_tokens_of_any_length_and_the_tokenizer_is_beside(texts, command):
    written, config = exported(command, texts)
    assert config["inputs"]["tokens"]["shape"] == ["batch", "length"]
    model = build_model(open_run(str(texts), "best"))
    for sentences in (["good"], ["a very good film", "dull", "bad , far too long " * 9]):
        tokenizer = Tokenizer.from_file(str(written / "tokenizer.json"))
        numbers = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
        longest = max(map(len, numbers))
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in numbers])
        lengths = torch.tensor([len(ids) for ids in numbers])
        inputs = {"tokens": tokens, "lengths": lengths}
        assert_both_answer(written, inputs, with_probabilities(model(tokens, lengths)))


def test_points_are_taken_as_they_are(folder, command):
    run = classified(folder, "blobs", "blobs")
    written, _ = exported(command, run)
    points = torch.randn(3, 2)
    assert_both_answer(written, {"points": points}, with_probabilities(build_model(open_run(str(run), "best"))(points)))


def test_an_autoencoder_takes_pixels_and_gives_them_in_0_to_1(folder, command):
    write_images(folder / "pictures", 20)
    settings = {"dataset": str(folder / "pictures"), "num_train_epochs": 1, "kl_weight": 1e-3, "width": 4}
    run = train(reconstruct, reconstruct.ReconstructSettings, folder, "vae", **settings)
    written, config = exported(command, run)
    assert config["outputs"] == ["reconstruction"] and config["class_names"] == []
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert_both_answer(written, {"images": images}, (build_model(open_run(str(run), "best"))(images / 255),))


def test_a_model_of_transformers_takes_texts_up_to_the_length_it_was_trained_for(folder, texts, command):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertConfig(**sizes, max_position_embeddings=32).save_pretrained(folder / "bert")
    name = f"hf:{folder / 'bert'}"
    run = classified(folder, "hf", folder / "texts.csv", model=name, max_length=20)
    (folder / "bert" / "config.json").unlink()  # the checkpoint keeps it
    written, _ = exported(command, run)
    model = build_model(open_run(str(run), "best"))
    for length in (2, 24):
        inputs = {"tokens": torch.randint(2, 9, (3, length)), "lengths": torch.tensor([1, 2, length])}
        assert_both_answer(written, inputs, with_probabilities(model(*inputs.values())))
    card = (written / "README.md").read_text()
    assert "up to a length of 2 to 24" in card and '"tokens": np.ones([1, 2], np.int64)' in card


def test_a_stateful_lstm_gives_its_state_back(folder, command):
    chance = np.random.default_rng(0)
    np.save(folder / "sequence.npy", chance.normal(size=(90, 4)))
    settings = {"data": str(folder / "sequence.npy"), "test_data": str(folder / "sequence.npy")}
    run = train(
        stateful_lstm, stateful_lstm.StatefulSettings, folder, "stateful",
        **settings, num_train_epochs=1, hidden_size=8, engine="eager",
    )  # fmt: skip
    written, _ = exported(command, run)
    model = build_model(open_run(str(run), "latest"))
    samples, h, c = torch.randn(3, 11, 3), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    answers, state = model(samples, (h, c))
    assert_both_answer(written, {"samples": samples, "h": h, "c": c}, (answers, *state))
    for kind in FORMATS:  # in two calls, the state carried over
        file = open_format(written / FILES[kind])
        first, *carried = file({"samples": samples[:, :4], "h": h, "c": c})
        second, *_ = file({"samples": samples[:, 4:], "h": carried[0], "c": carried[1]})
        torch.testing.assert_close(torch.cat([first, second], dim=1), answers.detach(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_tables_in_no_file_are_checked_with_their_raw_numbers(folder, name):
    run = open_run(str(classified(folder, name, name)), "best")
    _, samples = load_real_samples(run)
    graph = build_graph(run)
    assert [len(one.inputs["numbers"]) for one in samples] == {"wine": [1, 7, 19], "breast_cancer": [1, 7, 56]}[name]
    assert max(float(one.inputs["numbers"].max()) for one in samples) > 100  # not standardised
    for one in samples:
        torch.testing.assert_close(graph.module(**one.inputs), one.expected)


def test_rows_of_the_right_split_are_read_where_bad_ones_were_left_out(folder):
    data = folder / "split"
    data.mkdir()
    for name, seed in (("train", 0), ("test", 1)):
        file = write_people(data / f"{name}.csv", 60, seed=seed, header=("age", "label"))
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], "inf,cat", *lines[1:5], "", "inf,dog", *lines[5:]]) + "\n")
    for dataset, expected in ((data / "train.csv", "validation"), (data, "test")):
        run = open_run(str(classified(folder, f"{expected}_rows", dataset, on_bad_sample="skip")), "best")
        split, samples = load_real_samples(run)
        assert split == expected
        graph = build_graph(run)
        for one in samples:
            torch.testing.assert_close(graph.module(**one.inputs), one.expected)


def test_answers_that_differ_are_refused_and_nothing_is_written(people, command, monkeypatch, tmp_path):
    run, _ = people
    before = sorted(run.rglob("*"))

    def build_wrong(found):
        graph = build_graph(found)
        graph.module.mean += 0.01 * graph.module.std
        return graph

    monkeypatch.setattr("train.evaluation.graph.build_graph", build_wrong)
    code, _, (line,) = command(run, "--format", "pt2")
    assert code == 2 and "model.pt2: answers differ from the model's by" in line and "0.0001 is allowed" in line
    assert {file for file in sorted(run.rglob("*")) if file.is_file()} == {file for file in before if file.is_file()}


def test_missing_packages_are_named_and_the_other_format_needs_none(digits, command, monkeypatch):
    find = formats_module.importlib.util.find_spec
    hide = {"onnx", "onnxscript", "onnxruntime"}
    monkeypatch.setattr(formats_module.importlib.util, "find_spec", lambda n, *a: None if n in hide else find(n, *a))
    code, _, (line,) = command(digits)
    assert code == 2 and "pip install onnx onnxscript onnxruntime" in line and "--format pt2" in line
    code, out, errors = command(digits, "--format", "pt2")
    assert (code, errors) == (0, [])
    assert not (digits.__class__(out[-1].removeprefix("wrote ")) / "model.onnx").exists()


def test_data_that_are_gone_are_named(people, command):
    run, file = people
    moved = file.rename(file.with_suffix(".moved"))
    try:
        code, _, (line, *_) = command(run, "--format", "pt2")
    finally:
        moved.rename(file)
    assert code == 2 and "people.csv" in line


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; yields what it was asked, by method and path, and what it answers."""
    asked, refused = [], []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked.append((self.path, body))
            if refused:
                return self.reply(refused[0], {"error": "no such right"})
            url = f"http://{self.headers['Host']}/me/wine"
            if self.path.endswith("/preupload/main"):
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return self.reply(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
            return self.reply(200, {"url": url, "commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True})

        def do_GET(self):
            asked.append((self.path, ""))
            self.reply(200, {"sha": "0", "id": "me/wine", "siblings": []})

        def reply(self, code, values):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # tests are; this hub is on the machine
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield asked, refused
    server.shutdown()
    server.server_close()


def test_a_hub_that_cannot_be_reached_is_one_message(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match=r"--push_to_hub me/wine: .*refused.*the export is in"):
        export.push(tmp_path, "me/wine")


def test_a_name_that_no_repository_can_have_is_refused_before_the_export(digits, command):
    code, out, (line,) = command(digits, "--push_to_hub", "a/b/c")
    assert (code, out) == (2, []) and "--push_to_hub a/b/c: Repo id" in line


def test_an_export_is_pushed_in_one_commit_to_a_private_repository(hub, tmp_path, capsys):
    asked, _ = hub
    for name in ("README.md", "model.safetensors"):
        (tmp_path / name).write_text(f"this is {name}")
    export.push(tmp_path, "me/wine")
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/wine/commit/1")
    (created,) = [json.loads(body) for path, body in asked if path == "/api/repos/create"]
    assert created["name"] == "wine" and created["organization"] == "me"
    assert created.get("private", created.get("visibility")) in (True, "private")
    (commit,) = [body for path, body in asked if path.endswith("/commit/main")]
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    files = {line["path"]: base64.b64decode(line["content"]).decode() for line in lines if "path" in line}
    assert files == {name: f"this is {name}" for name in ("README.md", "model.safetensors")}


def test_a_hub_that_refuses_is_one_message_and_the_export_stays(hub, tmp_path):
    asked, refused = hub
    refused.append(403)
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(UsageError) as caught:
        export.push(tmp_path, "me/wine")
    (line,) = caught.value.problems
    assert line.startswith("--push_to_hub me/wine: ") and str(tmp_path) in line and "403" in line
    assert (tmp_path / "README.md").exists() and asked
