"""Tokenizers: text to ids and back, from the files of a checkpoint or from the metadata of a GGUF file.

A ``tokenizer.json`` is run by the tokenizers library directly, and says itself what goes around a text: as in transformers 5,
``add_bos_token`` of a tokenizer config counts only where there is no ``tokenizer.json``. transformers is imported for a
bare SentencePiece model alone. Knows no model, no weights and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from quantkit import fs
from quantkit.errors import InputError
from quantkit.formats.jsonfile import parse_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER, TOKENIZER_CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
SPECIAL_TOKENS, GENERATION, CONFIG = "special_tokens_map.json", "generation_config.json", "config.json"
TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
LIMITS: Mapping[str, int] = MappingProxyType(
    {
        TOKENIZER: 128 << 20,
        TOKENIZER_CONFIG: 32 << 20,
        SPECIAL_TOKENS: 1 << 20,
        GENERATION: 1 << 20,
        CONFIG: 16 << 20,
        TEMPLATE_FILE: 1 << 20,
        TEMPLATE_JSON: 1 << 20,
    }
)
"""The files that are read, and the most bytes that each may have."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TEMPLATE = "default"
REPLACEMENT = "\ufffd"
NO_TOKENIZER = f"{TOKENIZER}, or {SENTENCEPIECE}"


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: the tokenizer's own first, then those of the generation config and ``config.json``."""

    @property
    def chat_template(self) -> str | None:
        """The default chat template (Jinja), or None."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """``bos_token``, ``eos_token``, ...: the text of each special token that has such a name."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of ``text``. With ``special`` the tokenizer adds what it puts around a text (BOS, EOS).

        The text of a special token is always recognized. Raises InputError for text that is not Unicode (a lone surrogate).
        """

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``; with ``special`` special tokens stay in it."""


@dataclass(frozen=True, slots=True)
class BackendTokenizer:
    """A Tokenizer run by the tokenizers library. Made by ``load_tokenizer``."""

    backend: Backend
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: Mapping[str, str]
    byte_tokens: frozenset[int]
    """Ids of ``<0x00>`` to ``<0xFF>`` where they decode to bytes: the text of a run of them is known when the run has ended."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        try:
            # As a batch of one: only then does the library let other threads run meanwhile, and skips the offsets that nobody reads.
            return list(self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        except (UnicodeEncodeError, TypeError) as exc:
            raise InputError("text", "holds half a surrogate pair", "Unicode text") from exc

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))


def load_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, artifact or shard directory, or of a ``.gguf`` file.

    Raises InputError when there is none, or its files are broken or name ids that do not exist.
    """
    if root.is_dir():
        names = [name for name in LIMITS if (root / name).is_file()]
        files = {name: fs.read_bytes(fs.confined(root, name, str(root)), LIMITS[name]) for name in names}
    else:
        from quantkit.formats.gguf import read_gguf
        from quantkit.text.gguf_tokenizer import hf_files

        files = hf_files(read_gguf(root))
    if TOKENIZER in files:
        backend = parse_backend(files[TOKENIZER], f"{root}: {TOKENIZER}")
    elif (root / SENTENCEPIECE).is_file():
        backend = _sentencepiece_backend(root)
    else:
        raise InputError(str(root), "has no tokenizer", NO_TOKENIZER, "copy the tokenizer files of the original model into the directory")
    return _assemble(backend, files, str(root))


def parse_backend(data: bytes, where: str) -> Backend:
    """The tokenizer that a ``tokenizer.json`` describes, without truncation and padding. Raises InputError when it is broken."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(_utf8(data, where))
    except Exception as exc:  # the library raises nothing more particular
        raise InputError(
            where, f"is refused by the tokenizers library ({exc!s:.200})", "a tokenizer.json of the tokenizers library"
        ) from exc
    backend.no_truncation()
    backend.no_padding()
    return backend


def _sentencepiece_backend(root: Path) -> Backend:
    from transformers import AutoTokenizer

    where = f"{root}: {SENTENCEPIECE}"
    expected = "a SentencePiece model that transformers reads"
    try:
        loaded = AutoTokenizer.from_pretrained(str(root), local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as exc:  # whatever the model's own tokenizer class trips over
        raise InputError(where, f"transformers cannot read it ({exc!s:.200})", expected) from exc
    if not loaded.is_fast:
        raise InputError(where, f"transformers reads it as {type(loaded).__name__}, without a tokenizer.json", expected)
    return parse_backend(loaded.backend_tokenizer.to_str().encode(), where)


def _assemble(backend: Backend, files: Mapping[str, bytes], root: str) -> BackendTokenizer:
    def load(name: str) -> dict[str, Any]:
        return parse_object(files[name], f"{root}: {name}") if name in files else {}

    config, model = load(TOKENIZER_CONFIG), load(CONFIG)
    special = named_tokens({**load(SPECIAL_TOKENS), **config})
    size = _vocab_size(backend)
    named = {key: backend.token_to_id(special[key]) for key in ("bos_token", "eos_token") if key in special}
    for key, found in named.items():
        if found is None:
            raise InputError(f"{root}: {TOKENIZER_CONFIG}", f"{key} {special[key]!r:.100} is not in the vocabulary", "a token of it")
    bos, eos = named.get("bos_token"), named.get("eos_token")
    text_model = model.get("text_config")
    model = {**(text_model if isinstance(text_model, dict) else {}), **model}
    declared = model.get("vocab_size")
    limit = max(size, declared if isinstance(declared, int) else 0)
    ids = [eos] if eos is not None else []
    for name, values in ((GENERATION, load(GENERATION)), (CONFIG, model)):
        ids += _ids(values.get("eos_token_id"), limit, f"{root}: {name}: eos_token_id")
    return BackendTokenizer(
        backend=backend,
        vocab_size=size,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(ids)),
        chat_template=_chat_template(files, config, root),
        special_tokens=MappingProxyType(special),
        byte_tokens=_byte_tokens(backend),
    )


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens; each is its text, or an object with its ``content``."""
    found = {}
    for key in NAMED_TOKENS:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _vocab_size(backend: Backend) -> int:
    """One more than the greatest id; ids may have holes, and then counting tokens is not enough."""
    size = int(backend.get_vocab_size(with_added_tokens=True))
    if size and backend.id_to_token(size - 1) is not None and backend.id_to_token(size) is None:
        return size
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _ids(value: object, limit: int, where: str) -> list[int]:
    """One id, a list of ids, or None. Raises InputError for anything else or an id that no vocabulary has."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    for item in found:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < limit:
            raise InputError(where, f"is {item!r:.100}", f"token ids from 0 to {limit - 1}")
    return list(found)


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], root: str) -> str | None:
    """The default template: a ``chat_template.jinja`` wins, as in transformers, then the tokenizer config's, then a chat_template.json."""
    if TEMPLATE_FILE in files:
        return _utf8(files[TEMPLATE_FILE], f"{root}: {TEMPLATE_FILE}")
    where, template = f"{root}: {TOKENIZER_CONFIG}: chat_template", config.get("chat_template")
    if template is None and TEMPLATE_JSON in files:
        where = f"{root}: {TEMPLATE_JSON}"
        template = parse_object(files[TEMPLATE_JSON], where).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if not isinstance(template, list) or not all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in template):
        raise InputError(where, f"is {type(template).__name__}", "a template, or a list of templates with names")
    by_name = {t.get("name"): str(t["template"]) for t in template}
    return by_name.get(DEFAULT_TEMPLATE) if len(by_name) != 1 else next(iter(by_name.values()))


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise InputError(where, f"is not UTF-8 at byte {exc.start}", "UTF-8 text") from exc


def _byte_tokens(backend: Backend) -> frozenset[int]:
    """The byte tokens, when the decoder turns them into bytes; else they are text like any other."""
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    found = [index for index in ids if index is not None]
    if len(found) != 256 or backend.decode([found[ord("A")]], skip_special_tokens=False) != "A":
        return frozenset()
    return frozenset(found)


CONTEXT_TOKENS = 6
"""Of what a text goes on from, the tokens that can change how its first ones decode."""


class StreamDecoder:
    """Text of a growing list of tokens: what ``push`` and ``finish`` return, joined, is ``tokenizer.decode`` of all of them.

    ``after``: the tokens that they go on from, whose own text is left out. Of tokens that decode alike alone and in a text, which a first
    space does not, that changes nothing.

    Text comes as soon as no later token can change it, so a character is never split. Decoding starts at the last tokens whose text
    is out: a SentencePiece decoder drops the space before the first token it sees, and must not drop one in the middle.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = tokenizer.byte_tokens if isinstance(tokenizer, BackendTokenizer) else frozenset[int]()
        self._window: list[int] = []
        self._in_bytes = False
        """Whether the text ends in a run of byte tokens, all of which a later byte may change."""
        self._known = 0
        """Tokens of the window whose text is out."""
        self._shown = ""
        """The text of those, as it decodes in this window."""
        context = list(after[-CONTEXT_TOKENS:])
        text = tokenizer.decode(context)
        if context and context[-1] not in self._byte_tokens and not text.endswith(REPLACEMENT):  # else it may end within a character
            self._window, self._known, self._shown = context, len(context), text

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, often its own, "" when more tokens are needed."""
        self._window.append(token)
        if token in self._byte_tokens:
            self._in_bytes = True
        elif self._in_bytes and self._tokenizer.decode([token]):
            self._in_bytes = False  # a special token has no text, and does not end a run of bytes
        text = self._tokenizer.decode(self._window)
        if self._in_bytes or len(text) <= len(self._shown) or text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._shown) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._shown = self._tokenizer.decode(self._window)
        return new

    def finish(self) -> str:
        """The text that was still held back. Push nothing afterwards."""
        text = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._window, self._known, self._shown = [], 0, ""
        return text


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """All the text that a StreamDecoder makes of ``tokens``."""
    decoder = StreamDecoder(tokenizer)
    return "".join([*(decoder.push(token) for token in tokens), decoder.finish()])
