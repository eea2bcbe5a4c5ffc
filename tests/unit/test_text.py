"""Texts become the same token numbers everywhere, from words of the training rows only, and padding is only padding."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.text import TextPreprocessing, Texts, count_changes, fit_text, sample_lines

ROOT = Path(__file__).resolve().parents[2]
quick = settings(deadline=None, max_examples=40)


def rows_of(texts, skip_bad=False):
    data = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    return Rows("train", data, lambda row: f"a.csv, line {row + 2}", skip_bad)


def fit(texts, chosen=None, **options):
    rows = rows_of(texts)
    chosen = torch.arange(len(rows)) if chosen is None else torch.tensor(chosen)
    return fit_text(rows, chosen, "text", DataOptions(**{"min_count": 1, **options}))


def words(preprocessing):
    """Return the vocabulary in the order of its numbers."""
    numbers = preprocessing.tokenizer.get_vocab()
    return sorted(numbers, key=numbers.get)


def encode(preprocessing, *texts):
    """Return the token numbers of each text."""
    found = preprocessing.encode(rows_of(list(texts)))
    return [part.tolist() for part in found.tokens.split(found.lengths.tolist())]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Return the path of a byte-level BPE with [CLS] and [SEP] that asks for padding, truncation and dropout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[CLS]", "[SEP]", "[PAD]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, this is fine", "héllo wörld"] * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=12, pad_id=2, pad_token="[PAD]")
    tokenizer.model.dropout = 0.5
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def bare(path):
    """Return the tokenizer of a file without what the file asks for."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.model.dropout = None
    return tokenizer


# The vocabulary


def test_words_are_numbered_by_frequency_then_by_code_points():
    preprocessing, notes = fit(["b b a zz", "Zz, zz c"])
    assert words(preprocessing) == ["[PAD]", "[UNK]", "zz", "b", ",", "a", "c"]
    assert notes == ["vocabulary: 5 words, all that occur 1+ times in column 'text' of the training rows"]
    assert preprocessing.input_spec.task == "text"
    assert preprocessing.input_spec.vocabulary_size == 7


def test_only_chosen_rows_enter_the_vocabulary():
    texts = ["common words here", "secret secret secret", "common words"]
    preprocessing, _ = fit(texts, chosen=[2, 0])
    assert words(preprocessing) == ["[PAD]", "[UNK]", "common", "words", "here"]
    assert encode(preprocessing, "secret words") == [[1, 3]]


def test_a_validation_text_changes_no_number():
    training = ["the cat sat", "on the mat"]
    one, _ = fit([*training, "other words"], chosen=[0, 1])
    other, _ = fit([*training, "the the mat mat mat"], chosen=[0, 1])
    assert one.describe() == other.describe()


@pytest.mark.parametrize(("min_count", "kept"), [(1, ["a", "b", "c"]), (2, ["a", "b"]), (3, ["a"])])
def test_min_count_is_the_fewest_occurrences(min_count, kept):
    preprocessing, _ = fit(["a a b", "a b c"], min_count=min_count)
    assert words(preprocessing)[2:] == kept


@pytest.mark.parametrize(("size", "kept"), [(1, ["a"]), (2, ["a", "b"]), (3, ["a", "b", "c"]), (4, ["a", "b", "c"])])
def test_vocab_size_counts_words_without_padding_and_unknown(size, kept):
    preprocessing, (note,) = fit(["a a b", "a b c"], vocab_size=size)
    assert words(preprocessing)[2:] == kept
    assert preprocessing.input_spec.vocabulary_size == len(kept) + 2
    assert ("the most frequent" in note) == (size <= 3)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "é", "!", "_x"])), min_size=1).filter(any), st.integers(1, 9))
def test_the_vocabulary_is_what_counting_gives_in_any_order_of_texts(lists, size):
    texts = [" ".join(words) for words in lists]
    counts = {word: sum(words.count(word) for words in lists) for words in lists for word in words}
    expected = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    for seed in range(2):
        preprocessing, _ = fit(texts, vocab_size=size)
        assert words(preprocessing)[2:] == expected
        random.Random(seed).shuffle(texts)


def test_a_large_vocabulary_with_ties_is_the_same_each_time():
    texts = [" ".join(f"w{(i * k) % 700}" for k in range(40)) for i in range(2500)]  # over several blocks
    first, _ = fit(texts, vocab_size=300, min_count=2)
    random.Random(0).shuffle(texts)
    second, _ = fit(texts, vocab_size=300, min_count=2)
    assert first.describe() == second.describe()
    assert json.dumps(first.describe()) == json.dumps(second.describe())


def test_case_and_composition_of_letters_do_not_matter_and_signs_are_words():
    preprocessing, _ = fit(["caf\u00e9 don't stop..."])
    assert set(words(preprocessing)[2:]) == {"café", "don", "'", "t", "stop", "..."}
    one, other = encode(preprocessing, "CAF\u00c9 stop", "Cafe\u0301\n\tSTOP")
    assert one == other and 1 not in one


def test_no_text_can_say_padding_or_unknown():
    preprocessing, _ = fit(["[PAD] [UNK] [pad] word"])
    (numbers,) = encode(preprocessing, "[PAD] [UNK] word")
    assert min(numbers) > 1
    assert len(numbers) == 7  # brackets are signs


def test_a_vocabulary_without_words_is_refused():
    with pytest.raises(DataError) as caught:
        fit(["a b", "c d"], min_count=2)
    assert str(caught.value) == (
        "split 'train', column 'text': no word occurs 2 times in the training rows; lower --min_count or name another "
        "column with --input_columns"
    )
    with pytest.raises(DataError, match="no word occurs 1 times"):
        fit(["", "  "])


# Encoding


def test_truncated_and_empty_texts_are_counted():
    preprocessing, _ = fit(["a b c d e"], max_length=3)
    texts = preprocessing.encode(rows_of(["a b c d", "a b c", "", "a b c d e", " \n", "unheard"]))
    assert texts.lengths.tolist() == [3, 3, 1, 3, 1, 1]
    assert texts.tokens.tolist() == [2, 3, 4, 2, 3, 4, 1, 2, 3, 4, 1, 1]
    assert texts.cut.tolist() == [True, False, False, True, False, False]
    assert (len(texts), texts.truncated, texts.empty) == (6, 2, 2)
    assert texts.tokens.dtype == torch.int32 and texts.offsets.dtype == torch.int64


def test_texts_are_encoded_the_same_in_every_block():
    preprocessing, _ = fit(["a b c d e"], max_length=4)
    texts = ["a b c d e"[: 2 * (row % 5) + 1] for row in range(2345)]
    found = preprocessing.encode(rows_of(texts))
    assert found.lengths.tolist() == [min(4, row % 5 + 1) for row in range(2345)]
    assert found.truncated == 469 and found.empty == 0
    assert found.gather(torch.tensor([2344]))["tokens"].tolist() == [[2, 3, 4, 5, 0, 0, 0, 0]]


@pytest.mark.parametrize(("values", "problem"), [([None, "b"], "is empty"), ([[1], [2]], "holds list, not text")])
def test_a_row_without_text_stops(values, problem):
    preprocessing, _ = fit(["a b"])
    with pytest.raises(DataError, match=f"a.csv, line 2: column 'text' {problem}. Correct or remove it"):
        preprocessing.encode(rows_of(values))


def test_rows_without_text_are_rejected_and_hold_filler():
    preprocessing, _ = fit(["a b"])
    rows = rows_of(["a", None, "", "b", None], skip_bad=True)
    texts = preprocessing.encode(rows)
    assert texts.tokens.tolist() == [2, 1, 1, 3, 1]
    assert texts.empty == 1  # a rejected row is no empty text
    assert rows.bad == {1: "a.csv, line 3: column 'text' is empty", 4: "a.csv, line 6: column 'text' is empty"}
    assert rows.good().tolist() == [0, 2, 3]


def test_rows_without_text_are_found_while_counting_words():
    rows = rows_of(["a", None, "b", None], skip_bad=True)
    preprocessing, _ = fit_text(rows, torch.tensor([1, 2]), "text", DataOptions(min_count=1))
    assert words(preprocessing) == ["[PAD]", "[UNK]", "b"]
    assert list(rows.bad) == [1]  # row 3 was not chosen
    with pytest.raises(DataError, match=r"a\.csv, line 3"):
        fit_text(rows_of(["a", None]), torch.tensor([0, 1]), "text", DataOptions(min_count=1))


# A saved preprocessing


@quick
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_a_vocabulary_survives_json(texts):
    preprocessing, _ = fit(["a b c é ! the cat"], max_length=5)
    again = TextPreprocessing.from_description(json.loads(json.dumps(preprocessing.describe())))
    assert again.input_spec == preprocessing.input_spec
    assert encode(again, *texts) == encode(preprocessing, *texts)
    assert again.describe() == preprocessing.describe()


def test_a_description_names_column_and_length():
    description = fit(["a b"], max_length=7)[0].describe()
    assert {key: description[key] for key in ("column", "max_length", "shift")} == {
        "column": "text",
        "max_length": 7,
        "shift": 0,
    }
    assert description["tokenizer"]["model"]["vocab"] == {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}


# A given tokenizer


def test_a_given_tokenizer_keeps_its_numbers_moved_up_by_two(foreign):
    preprocessing, notes = fit(["never read"], tokenizer=foreign)
    tokenizer = bare(foreign)
    assert notes == []
    assert preprocessing.input_spec.vocabulary_size == tokenizer.get_vocab_size() + 2
    texts = ["hello world this is fine and long", "héllo", "[PAD]"]
    assert encode(preprocessing, *texts) == [[number + 2 for number in tokenizer.encode(text).ids] for text in texts]


def test_tokens_added_to_a_given_tokenizer_count(foreign, tmp_path):
    tokenizer = bare(foreign)
    tokenizer.add_special_tokens(["[NEW]"])
    tokenizer.save(str(tmp_path / "t.json"))
    preprocessing, _ = fit([], tokenizer=str(tmp_path / "t.json"))
    assert max(encode(preprocessing, "a [NEW]")[0]) == preprocessing.input_spec.vocabulary_size - 1


def test_padding_truncation_and_dropout_of_a_file_are_switched_off(foreign):
    preprocessing, _ = fit([], tokenizer=foreign, max_length=50)
    long = "hello world " * 5
    results = [encode(preprocessing, "hi", long) for _ in range(20)]
    assert all(result == results[0] for result in results)
    assert len(results[0][0]) == 4 and 3 < len(results[0][1]) < 50
    saved = preprocessing.describe()["tokenizer"]
    assert saved["padding"] is None and saved["truncation"]["max_length"] == 50 and saved["model"]["dropout"] is None


def test_a_cut_text_keeps_the_closing_token(foreign):
    preprocessing, _ = fit([], tokenizer=foreign, max_length=4)
    texts = preprocessing.encode(rows_of(["hello world this", "hello world", "hello", ""]))
    whole = torch.tensor(bare(foreign).encode("hello world this").ids) + 2
    assert texts.lengths.tolist() == [4, 4, 3, 2]
    assert texts.tokens[:4].tolist() == [*whole[:3].tolist(), 1 + 2]
    assert texts.cut.tolist() == [True, False, False, False]
    assert texts.empty == 1  # though it has two tokens, both added


def test_an_empty_text_of_a_tokenizer_that_adds_nothing_is_one_unknown(foreign, tmp_path):
    tokenizer = bare(foreign)
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save(str(tmp_path / "t.json"))
    preprocessing, _ = fit([], tokenizer=str(tmp_path / "t.json"))
    texts = preprocessing.encode(rows_of(["", "hello"]))
    assert texts.tokens[0] == 1 and texts.tokens[1:].min() > 1
    assert texts.empty == 1
    assert preprocessing.decode(texts.tokens[:1]) == "[UNK]"


def test_a_given_tokenizer_survives_json(foreign):
    preprocessing, _ = fit([], tokenizer=foreign, max_length=9)
    again = TextPreprocessing.from_description(json.loads(json.dumps(preprocessing.describe())))
    texts = ["hello wörld, this is fine and long", "", "日本"]
    assert encode(again, *texts) == encode(preprocessing, *texts)
    assert again.input_spec == preprocessing.input_spec


def test_tokens_that_a_tokenizer_adds_must_leave_room(foreign):
    with pytest.raises(DataError, match=r"^--max_length 2: the tokenizer adds 2 tokens of its own .* give 3 or more$"):
        fit([], tokenizer=foreign, max_length=2)
    assert encode(fit([], tokenizer=foreign, max_length=3)[0], "hello world")[0][0] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read: EOF while parsing a value at line 1 column 0; give a tokenizer.json file or a hub id"),
        ('{"version": "1.0"}', "cannot be read: Model missing"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        fit([], tokenizer=str(path))
    assert str(caught.value).startswith(f"--tokenizer {path}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.json", "./absent", "/absent/tokenizer", "~/absent", "a/b/c"])
def test_an_absent_file_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError) as caught:
        fit([], tokenizer=name)
    assert str(caught.value) == f"--tokenizer {name}: no such file; give a tokenizer.json file or a hub id"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; give a tokenizer\.json file"):
        fit([], tokenizer=str(tmp_path))


def test_a_hub_id_is_asked_of_the_hub(monkeypatch, foreign):
    asked = []

    def download(*, repo_id, filename, **_):
        asked.append((repo_id, filename))
        return foreign

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    preprocessing, _ = fit([], tokenizer="some/model")
    assert asked == [("some/model", "tokenizer.json")]
    assert encode(preprocessing, "hello") == [[number + 2 for number in bare(foreign).encode("hello").ids]]


def test_a_hub_that_fails_is_told_in_one_line(monkeypatch):
    def download(*_, **__):
        raise OSError("no network.\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DataError) as caught:
        fit([], tokenizer="some/model")
    assert str(caught.value) == (
        "--tokenizer some/model: is no file, and on the hub: no network; give a tokenizer.json file or a hub id"
    )


def test_a_tokenizer_that_fails_on_a_text_is_told(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    preprocessing, _ = fit([], tokenizer=str(tmp_path / "t.json"))
    assert encode(preprocessing, "a") == [[2]]
    with pytest.raises(DataError, match=r"^split 'train', column 'text': the tokenizer cannot encode it: WordLevel"):
        encode(preprocessing, "b")


# Batches


def texts_of(lists):
    lengths = torch.tensor([0, *map(len, lists)])
    tokens = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int32)
    return Texts(tokens, lengths.cumsum(0), torch.zeros(len(lists), dtype=torch.bool), 0)


number_lists = st.lists(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=30), min_size=1, max_size=8)


@quick
@given(number_lists, st.data())
def test_gather_is_what_padding_each_text_gives(lists, data):
    indices = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=12))
    batch = texts_of(lists).gather(torch.tensor(indices))
    longest = max(len(lists[index]) for index in indices)
    width = next(width for width in range(0, 100, 8) if width >= longest)
    assert batch["tokens"].tolist() == [lists[i] + [0] * (width - len(lists[i])) for i in indices]
    assert batch["lengths"].tolist() == [len(lists[i]) for i in indices]
    assert list(batch) == ["tokens", "lengths"]
    assert batch["tokens"].dtype == batch["lengths"].dtype == torch.int64


@quick
@given(number_lists)
def test_gathering_changes_nothing_that_is_stored(lists):
    texts = texts_of(lists)
    before = texts.fingerprint()
    texts.gather(torch.arange(len(lists)))["tokens"].zero_()
    texts.gather(torch.tensor([0]))["lengths"].zero_()
    assert texts.fingerprint() == before


def test_the_fingerprint_knows_tokens_order_and_borders():
    prints = [texts_of(lists).fingerprint() for lists in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2], [4]])]
    assert len(set(prints)) == 4
    assert texts_of([[1, 2], [3]]).fingerprint() == prints[0]


# The look before a run


def test_samples_are_shown_as_the_network_sees_them():
    preprocessing, _ = fit(["the cat sat on the mat"], max_length=4)
    texts = preprocessing.encode(rows_of(["The CAT sat", "the dog sat on it", "", "skipped"]))
    labels = torch.tensor([0, 1, 1])
    assert sample_lines(preprocessing, texts, torch.tensor([1, 0, 2]), ["dogs", "cats"], labels) == [
        "dogs, 4 tokens (cut): the [UNK] sat on",
        "cats, 3 tokens: the cat sat",
        "cats, 1 token: [UNK]",
    ]


def test_cut_texts_and_unknown_words_are_counted():
    preprocessing, _ = fit(["the cat sat", "the cat sat"], max_length=3, min_count=1)
    texts = preprocessing.encode(rows_of(["the cat sat", "the cat sat down here", "a dog"]))
    assert count_changes(texts, torch.tensor([0, 1]), 3) == [
        "1 of 2 texts were cut to --max_length 3 tokens",
        "25% of the words are not in the vocabulary; raise --vocab_size or lower --min_count",
    ]
    known = preprocessing.encode(rows_of(["the cat sat"]))
    assert count_changes(known, torch.tensor([0]), 3) == []


def test_a_shown_sample_is_short_and_of_one_line(foreign):
    preprocessing, _ = fit([], tokenizer=foreign)
    texts = preprocessing.encode(rows_of(["a\n\x1b[31mb\r" + "ü" * 200]))
    (line,) = sample_lines(preprocessing, texts, torch.tensor([0]), ["x"], torch.tensor([0]))
    head, text = line.split(": ")
    assert head == "x, 256 tokens (cut)"
    assert text == "[CLS]a  [31mb " + "ü" * 83 + "..." and len(text) == 100


# Processes

WORK = ("preprocessing.encode(rows)", "fit()")


@pytest.mark.parametrize(
    ("work", "parallel"),
    [(WORK[0], {}), *[(work, {"TOKENIZERS_PARALLELISM": "true"}) for work in WORK]],
)
def test_a_forked_process_neither_hangs_nor_says_a_word(work, parallel):
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    code = f"""
import multiprocessing, datasets, torch
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.text import fit_text
rows = Rows("train", datasets.Dataset.from_dict({{"text": ["a b c"] * 3000}}), str)
def fit():
    return fit_text(rows, torch.arange(3000), "text", DataOptions())
preprocessing, _ = fit()
preprocessing.encode(rows)
child = multiprocessing.get_context("fork").Process(target=lambda: {work})
child.start()
child.join(30)
print(child.exitcode)
child.kill()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | parallel,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
