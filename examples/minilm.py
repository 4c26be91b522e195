"""MiniLM, a small BERT that turns a text into a vector, written in plain NumPy.

    text --tokenizer--> ids          (L,)              one whole number per word piece
         --look up----> hidden       (L, 384)          word + position + type embedding
         --6 layers---> hidden       (L, 384)          each layer: attention, then feed forward
         --mean-------> embedding    (384,)            scaled to length 1

Attention is where the tokens of a text look at each other; everything else treats each token by
itself. Texts are worked on in batches, as arrays of shape (B, L, 384), with the shorter ones
padded to L tokens. Only attention has to know: it gets the lengths, so that no token ever sees
padding, whatever padding holds. In a text of no tokens at all, every row is padding; attention
answers exactly zero there, where a softmax over nothing would be 0 / 0 = NaN.

A model is a directory in the form that sentence-transformers writes: ``config.json``,
``tokenizer.json`` and ``model.safetensors``.
"""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import fastattn


class SentenceEncoder:
    """A BERT sentence encoder with mean pooling, such as all-MiniLM-L6-v2.

    Parameters
    ----------
    directory : str or Path
        Where the model lies.

    Raises
    ------
    FileNotFoundError
        If one of the model's three files is not there.
    ValueError
        If the model is of another kind (not BERT, not GELU, not pooled by the mean).
    """

    def __init__(self, directory):
        directory = Path(directory)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} is not a sentence encoder: no {name} in it")

        self.config = json.loads((directory / "config.json").read_text())
        pooling = read_optional_json(directory / "1_Pooling" / "config.json")
        for name, value, expected in [
            ("model_type", self.config["model_type"], "bert"),
            ("hidden_act", self.config["hidden_act"], "gelu"),
            ("pooling_mode_mean_tokens", pooling.get("pooling_mode_mean_tokens", True), True),
        ]:
            if value != expected:
                raise ValueError(f"{directory}: {name} is {value!r}, this encoder has {expected!r}")

        # A BERT can take `max_position_embeddings` tokens; the sentence encoder made of it may
        # have been trained on fewer.
        limits = read_optional_json(directory / "sentence_bert_config.json")
        self.max_tokens = limits.get("max_seq_length") or self.config["max_position_embeddings"]
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()  # tokenizer.json may ask for 128 tokens, always

        self.weights = {
            name: weight.astype(np.float32, copy=False)
            for name, weight in load_file(directory / "model.safetensors").items()
        }

    def tokenize(self, texts, max_tokens=None):
        """Split texts into tokens.

        Parameters
        ----------
        texts : list of str
        max_tokens : int, optional
            Longer texts are cut there; by default, where the model's training did.

        Returns
        -------
        list of lists of int
            One list a text: [CLS], its word pieces, [SEP]. A text without a word piece gives an
            empty list.
        """
        self.tokenizer.enable_truncation(max_tokens or self.max_tokens)
        return [
            [] if all(encoding.special_tokens_mask) else encoding.ids
            for encoding in self.tokenizer.encode_batch(texts)
        ]

    def encode(self, token_lists, batch_size=32, advance=None):
        """Embed texts of any lengths, batch by batch.

        Parameters
        ----------
        token_lists : list of lists of int
            What `tokenize` returned.
        batch_size : int
            How many texts are padded to one length and worked on together.
        advance : callable, optional
            Called with the number of tokens that each batch has added (a progress bar's update).

        Returns
        -------
        array, shape (len(token_lists), hidden_size), dtype float32
            Vectors of length 1, so that `a @ b` is the cosine of the angle between two texts.
            That of an empty text is exactly zero, and so is its similarity to everything.
        """
        embeddings = np.zeros((len(token_lists), self.config["hidden_size"]), np.float32)
        # Texts of like length share a batch, for little padding; the longest come first, for a
        # progress bar that does not promise too much.
        order = np.argsort([-len(tokens) for tokens in token_lists], kind="stable")
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, lengths = pad([token_lists[i] for i in chosen])
            embeddings[chosen] = self.embed(ids, lengths)
            if advance:
                advance(int(lengths.sum()))
        return embeddings

    def embed(self, ids, lengths):
        """Embed one padded batch: ids (B, L) and lengths (B,) give vectors (B, hidden_size)."""
        hidden = self.look_up(ids)
        for layer in range(self.config["num_hidden_layers"]):
            hidden = self.attend(hidden, lengths, layer)
            hidden = self.feed_forward(hidden, layer)
        return normalize(mean_of_tokens(hidden, lengths))

    def look_up(self, ids):
        """Start from what each token means alone, and where it stands: (B, L, hidden_size)."""
        table = self.weights
        words = table["embeddings.word_embeddings.weight"][ids]
        positions = table["embeddings.position_embeddings.weight"][: ids.shape[1]]
        first_type = table["embeddings.token_type_embeddings.weight"][0]  # the 2nd is for pairs
        return self.layer_norm(words + positions + first_type, "embeddings.LayerNorm")

    def attend(self, hidden, lengths, layer):
        """Let every token gather what the other tokens of its text hold for it."""
        q, k, v = self.queries_keys_values(hidden, layer)
        gathered = attention(q, k, v, lengths)
        # Laid out as q is, so that the way back is a view as well.
        gathered = gathered.swapaxes(1, 2).reshape(hidden.shape)
        name = f"encoder.layer.{layer}.attention.output"
        return self.layer_norm(hidden + self.linear(gathered, f"{name}.dense"), f"{name}.LayerNorm")

    def queries_keys_values(self, hidden, layer):
        """Project hidden states to q, k, v of shape (B, heads, L, D): views, nothing is moved."""
        heads = self.config["num_attention_heads"]
        head_size = self.config["hidden_size"] // heads
        name = f"encoder.layer.{layer}.attention.self"
        return [
            self.linear(hidden, f"{name}.{projection}")
            .reshape(*hidden.shape[:2], heads, head_size)
            .swapaxes(1, 2)
            for projection in ("query", "key", "value")
        ]

    def feed_forward(self, hidden, layer):
        """Let every token think for itself: widen, bend (GELU), narrow again."""
        name = f"encoder.layer.{layer}"
        wide = self.linear(hidden, f"{name}.intermediate.dense")
        for text in wide:  # one text's share of the work fits in the cache
            text[:] = gelu(text)
        change = self.linear(wide, f"{name}.output.dense")
        return self.layer_norm(hidden + change, f"{name}.output.LayerNorm")

    def linear(self, x, name):
        """Map the last axis: x @ weight.T + bias."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        # As one matrix: one large product is faster than one product for each text.
        y = x.reshape(-1, x.shape[-1]) @ weight.T
        y += bias
        return y.reshape(*x.shape[:-1], len(bias))

    def layer_norm(self, x, name):
        """Give each token's vector mean 0 and variance 1, then a learned scale and shift."""
        x = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(x).mean(axis=-1, keepdims=True)
        x /= np.sqrt(variance + self.config["layer_norm_eps"])
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def attention(q, k, v, lengths):
    """Attend within each text of a padded batch.

    Parameters
    ----------
    q, k, v : arrays, shape (B, heads, L, D)
    lengths : integer array, shape (B,)
        Keys from a text's length on are padding, which no token attends to; queries from there
        on do not exist, and their rows are exactly zero.
    """
    return fastattn.scaled_dot_product_attention(q, k, v, q_lens=lengths, kv_lens=lengths)


def gelu(x):
    """Return x * Phi(x) with Phi the normal distribution function, 0 far left and x far right.

    Phi comes from formula 7.1.26 of Abramowitz and Stegun, whose error is below 1.5e-7:
    erf(z) = 1 - (a1 t + ... + a5 t**5) exp(-z**2) with t = 1 / (1 + p z), for z >= 0.
    """
    z = np.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    series = 1.061405429 * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + coefficient) * t
    return np.maximum(x, 0) - math.sqrt(0.5) * z * series * np.exp(-z * z)


def mean_of_tokens(hidden, lengths):
    """Average each text's vectors, padding left out; a text without tokens gives zero."""
    real = np.arange(hidden.shape[1]) < lengths[:, np.newaxis]
    total = hidden.sum(axis=1, where=real[..., np.newaxis])
    return total / np.maximum(lengths, 1)[:, np.newaxis].astype(np.float32)


def normalize(vectors):
    """Scale vectors to length 1; zero stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)


def pad(token_lists):
    """Stack lists of tokens as one array (B, L), zeros behind the shorter; return the lengths."""
    lengths = np.array([len(tokens) for tokens in token_lists])
    ids = np.zeros((len(token_lists), lengths.max(initial=0)), dtype=np.intp)
    for row, tokens in zip(ids, token_lists):
        row[: len(tokens)] = tokens
    return ids, lengths


def read_optional_json(path):
    """Return what the file holds, {} if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}
