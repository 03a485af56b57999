"""The tokenizer files of a transformers directory."""

from dataclasses import dataclass
from pathlib import Path

import tokenizers
import tokenizers.processors

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A ``tokenizer.json`` and the id of the token that ends a document."""

    path: Path
    end_id: int

    def load(self) -> tokenizers.Tokenizer:
        """The tokenizer without its post-processor: training text gets no special tokens."""
        tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        if tokenizer.num_special_tokens_to_add(False):
            tokenizer.post_processor = None
        return tokenizer


def tokenizer_files(path: Path) -> list[Path]:
    """The files of a directory that belong to its tokenizer."""
    return [path / name for name in _TOKENIZER_FILES if (path / name).is_file()]


def save_transformers_tokenizer(
    file: TokenizerFile, folder: Path, *, is_decoder: bool, window: int | None
) -> None:
    """Write a tokenizer as transformers loads it; BERT's adds [CLS] and [SEP] around text.

    Args:
        file: the tokenizer.
        folder: of the model.
        is_decoder: whether the model is one, or else a BERT.
        window: tokens that the model takes at most, where that is known.
    """
    import transformers

    backend = file.load()
    end = backend.id_to_token(file.end_id)
    names = {"bos_token": end, "eos_token": end} if is_decoder else _for_bert(backend)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _for_bert(backend: tokenizers.Tokenizer) -> dict[str, str]:
    """BERT's special tokens in a tokenizer, which is made to add [CLS] and [SEP] around text."""
    known = {name: f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")}
    known = {name: token for name, token in known.items() if backend.token_to_id(token) is not None}
    if {"cls", "sep"} <= known.keys():
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
        )
    known.setdefault("pad", known.get("sep", ""))
    return {f"{name}_token": token for name, token in known.items() if token}
