"""Tokenizers for checkpoints with random weights: small ones, trained here on a few sentences."""

import json
from io import BytesIO
from pathlib import Path

_SENTINELS = 100  # T5Tokenizer appends <extra_id_0> to <extra_id_99> to what the file holds
_VOCABULARY = 384  # with the sentinels within the 512 rows of the tiny embedding
_TEXTS = (
    "a large blue star on a yellow background, and a small red circle in the top left corner",
    "the quick brown fox jumps over the lazy dog, and two cats are sleeping under the table",
    "an oil painting of an old lighthouse at night, with waves and a bright moon",
    "what is this? it is a photo of mountains, rivers and forests in the morning light",
)


def write_tokenizer(folder: Path, class_name: str, rows: int) -> None:
    """Write the files of a tokenizer into `folder`.

    Args:
        class_name: of `transformers`: T5's or CLIP's.
        rows: of the text encoder's embedding, which every id has to fit.
    """
    write = _write_t5_tokenizer if class_name.endswith("T5Tokenizer") else _write_clip_tokenizer
    folder.mkdir(exist_ok=True)
    write(folder, rows)


def _write_t5_tokenizer(folder: Path, rows: int) -> None:
    """A SentencePiece unigram model as T5's, whose ids fit an embedding of that many rows."""
    import sentencepiece

    characters = "".join(map(chr, range(33, 127)))
    trained = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_TEXTS * 8, " ".join(characters)]),
        model_writer=trained,
        model_type="unigram",
        vocab_size=min(_VOCABULARY, rows - _SENTINELS),
        hard_vocab_limit=False,  # fewer where the text has no more
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(trained.getvalue())


def _write_clip_tokenizer(folder: Path, rows: int) -> None:
    """A byte-level BPE as CLIP's: bytes, bytes that end a word, merges, and two control tokens of
    which the end is the largest id (the published text encoder finds it so). Padding is "!".
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=min(_VOCABULARY, rows), end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(_TEXTS * 8, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" first
    pieces = [*signs, *(f"{sign}</w>" for sign in signs)]
    pieces += ["".join(pair) for pair in merges[: rows - len(pieces) - 2]]
    merges = merges[: len(pieces) - 2 * len(signs)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, start, end])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}
    config |= {"bos_token": start, "eos_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
