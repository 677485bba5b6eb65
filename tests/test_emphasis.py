"""Prompts whose words weigh: the syntax, and what it does to the embeddings."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lowvram
from lowvram import artifacts, emphasis, errors
from lowvram.emphasis import of_characters, of_tokens, parse, plain
from lowvram.repository import resolve
from lowvram.request.encode import resolve_encode
from lowvram.stages.encode import load_tokenizer
from lowvram.stages.result import Outcomes
from lowvram.stages.texts import Job, Reader

# What A1111's `parse_prompt_attention` documents of itself, and more.
KNOWN = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    "balanced)": [("balanced)", 1)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
    ],
    "a (b:2": [("a ", 1), ("b:2", 1.1)],
    "ratio 16:9, (x:.5) (y: 2. ) z:1.3)": [
        ("ratio 16:9, ", 1), ("x", 0.5), (" ", 1), ("y", 2), (" z:1.3)", 1),
    ],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "([a])": [("a", 1)],
    r"C:\temp \\(x)": [("C:\\temp \\", 1), ("x", 1.1)],
    "()": [],
    "": [],
}  # fmt: skip


@pytest.mark.parametrize("prompt", KNOWN)
def test_the_common_syntax(prompt: str) -> None:
    found = [(each.text, each.weight) for each in parse(prompt)]
    assert [text for text, _ in found] == [text for text, _ in KNOWN[prompt]]
    for (_, weight), (_, expected) in zip(found, KNOWN[prompt], strict=True):
        assert weight == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("prompt", ["(a:10.1)", "(a:-1)", "((a:9):2)", "(" * 30 + "a"])
def test_weights_out_of_range(prompt: str) -> None:
    with pytest.raises(errors.RequestError, match="of “a” is out of range: 0 to 10"):
        parse(prompt)


@pytest.mark.parametrize("depth", range(1, 9))
def test_what_cancels_weighs_nothing(depth: int) -> None:
    """Exactly, or its embeddings would not be the same bits."""
    assert parse("(" * depth + "[" * depth + "a" + "]" * depth + ")" * depth)[0].weight == 1


def escaped(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


@given(st.text())
def test_escaped_text_is_itself(text: str) -> None:
    assert plain(parse(escaped(text))) == text
    assert all(each.weight == 1 for each in parse(escaped(text)))


@given(st.text(alphabet="ab()[]\\:1.5 ", max_size=30))
def test_anything_is_read_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except errors.RequestError:
        return
    assert all(0 <= each.weight <= 10 and each.text for each in found)
    assert all(a.weight != b.weight for a, b in pairwise(found))


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(0, 1000)), max_size=5))
def test_written_weights_are_read(parts: list[tuple[str, int]]) -> None:
    prompt = "".join(f"({escaped(text)}:{weight / 100})" for text, weight in parts)
    expected = [(char, weight / 100) for text, weight in parts for char in text]
    assert [(char, each.weight) for each in parse(prompt) for char in each.text] == expected


@given(
    st.lists(st.tuples(st.text("aAİ ßb.,", min_size=1), st.sampled_from([0.5, 1.5])), max_size=6)
)
def test_weights_follow_the_words_through_cleaning(parts: list[tuple[str, float]]) -> None:
    segments = [emphasis.Segment(text, weight) for text, weight in parts]
    text = plain(segments).lower().strip()
    lowered = [(c, each.weight) for each in segments for char in each.text for c in char.lower()]
    stripped = len(lowered) - len("".join(c for c, _ in lowered).lstrip())
    assert of_characters(segments, text) == [w for _, w in lowered[stripped:][: len(text)]]


def test_a_token_weighs_as_most_of_its_characters() -> None:
    weights = [1.0, 1.0, 2.0, 2.0, 2.0]
    spans = [(0, 2), (1, 5), (1, 3), (2, 3), (0, 0)]
    assert of_tokens(weights, "ab cd", spans) == (1, 2, 1, 2, 1)


@pytest.fixture(scope="module")
def reader() -> Reader:
    model = resolve("demo")
    return Reader(model.get_family(), load_tokenizer(model))


def job(reader: Reader, prompt: str, **options: Any) -> Job:
    task = resolve_encode(prompt, resolve("demo"), "x.embeds.safetensors", **options)
    outcomes = Outcomes(1)
    found = list(reader.jobs([task], outcomes))
    if not found:
        outcome = outcomes.in_order()[0]
        assert isinstance(outcome, errors.LowvramError)
        raise outcome
    return found[0]


WORDS = st.sampled_from(
    ["red", "circle,", "a", "<b>big</b>", "Sky.", "16:9", "&amp;", "“x”", "été"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from([1, 1.5])), min_size=1, max_size=6), st.booleans())
def test_the_tokens_are_those_of_the_words_alone(
    reader: Reader, parts: list[tuple[str, float]], clean: bool
) -> None:
    words = "a " + " ".join(word for word, _ in parts)
    weighted = "a " + " ".join(f"({word}:{w})" if w != 1 else word for word, w in parts)
    alone = job(reader, words, clean_caption=clean)
    made = job(reader, weighted, weighting=True, clean_caption=clean)
    assert made.texts == alone.texts
    assert made.items[0]["text"] == alone.items[0]["text"]
    weights = made.weights[0][""]
    assert weights == () or len(weights) == len(made.texts[0][""].ids)


def test_the_right_tokens_weigh(reader: Reader) -> None:
    """Also where a word is in the middle of a text that cleaning changes, and in padding."""
    made = job(reader, "<i>A</i> large (Blue STAR:1.5) on [x]", weighting=True, padding="max")
    (text, ids, weights) = made.items[0]["text"], made.texts[0][""].ids, made.weights[0][""]
    assert "blue star" in text and "(" not in text
    tokens = reader._tokenizer.convert_ids_to_tokens(list(ids))
    heavy = "".join(t for t, w in zip(tokens, weights, strict=True) if w == 1.5)
    light = "".join(t for t, w in zip(tokens, weights, strict=True) if w < 1)
    assert (heavy.replace("▁", ""), light.replace("▁", "")) == ("bluestar", "x")
    assert set(weights[len(text) :]) == {1.0}
    assert made.items[0]["weights"][1] == ["Blue STAR", 1.5]
    assert "negative_weights" not in made.items[0]


def test_weights_multiply_the_embeddings(tmp_path: Path) -> None:
    def made(name: str, prompt: str, **options: Any) -> dict[str, torch.Tensor]:
        path = tmp_path / f"{name}.embeds.safetensors"
        lowvram.encode(prompt, "demo", output=path, dtype="fp32", **options)
        return load_file(path)

    alone = made("alone", "a red circle", negative_prompt="blue")
    weighted = made("w", "a (red:1.5) circle", negative_prompt="[blue]", weighting=True)
    ratio = weighted["0.prompt_embeds"] / alone["0.prompt_embeds"]
    assert set(ratio.mean(dim=1).round(decimals=3).tolist()) == {1.0, 1.5}
    negative = weighted["0.negative_prompt_embeds"] / alone["0.negative_prompt_embeds"]
    assert negative[:-1].allclose(torch.tensor(1 / 1.1), atol=1e-4)
    header = artifacts.read_header(tmp_path / "w.embeds.safetensors")
    assert header.settings["weighting"] is True
    assert header.items[0]["weights"] == [["a ", 1.0], ["red", 1.5], [" circle", 1.0]]
    # Without weights in the text, or with brackets that are text, the same bits as ever.
    same = made("same", "a red circle", negative_prompt="blue", weighting=True)
    ones = made("ones", "a (red:1) ([circle])", negative_prompt="blue", weighting=True)
    for other in (same, ones):
        assert all(torch.equal(alone[name], other[name]) for name in alone)
    off = made("off", "a (red:1.5) circle", clean_caption=False)
    assert artifacts.read_header(tmp_path / "off.embeds.safetensors").items[0]["text"] == (
        "a (red:1.5) circle"
    )
    assert off["0.prompt_embeds"].shape != alone["0.prompt_embeds"].shape


def test_what_is_cut_is_quoted_with_its_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompt and negative prompt, at --max-tokens; of a list each once, and the right ones."""
    rows: list[Any] = [
        {"prompt": "a red circle", "max_tokens": 3},
        {"prompt": "a circle", "negative_prompt": "a very large blue star", "max_tokens": 5},
        {"prompt": "a red circle", "max_tokens": 3},
        "a red circle",
    ]
    lowvram.run_many(rows, "demo", tmp_path, steps=1, in_process=True)
    told = [each.message for each in caplog.records if "dropped" in each.message]
    assert len(told) == 2
    assert re.match(r"the prompt “a red circle” has \d+ tokens and 3 fit; dropped from", told[0])
    assert told[1].startswith("the negative prompt “a very large blue star” has ")
    items = [artifacts.read_header(path).items[0] for path in sorted(tmp_path.glob("*.embeds.*"))]
    assert told[0].endswith(f": “{items[0]['dropped']}”") and items[3]["dropped"] == ""
    assert items[0]["tokens"] == 3 and "a red circle".endswith(items[0]["dropped"])
    assert "a very large blue star".endswith(items[1]["negative_dropped"])


def test_of_a_long_tail_the_ends_are_quoted_and_the_file_has_all(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    made = job(reader, "a red circle " + "on blue " * 20_000 + "at the end", clean_caption=False)
    (told,) = [each.message for each in caplog.records if "dropped" in each.message]
    assert len(told) < 400
    quoted = told.partition("from its end: “")[2]
    assert quoted.startswith("on blue") and quoted.endswith("at the end”") and " … " in quoted
    assert len(made.items[0]["dropped"]) > 100_000
