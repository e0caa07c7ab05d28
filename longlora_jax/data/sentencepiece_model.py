"""SentencePiece models (tokenizer.model), encoded by SentencePiece itself, with the tokens that other files add."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders

# Field 3 of NormalizerSpec (add_dummy_prefix: false) in field 3 of ModelProto (sentencepiece_model.proto): protobuf
# reads what comes later over what came before.
_NO_PREFIX = b"\x1a\x02\x18\x00"
_SPACE = "\u2581"


class Encoding(NamedTuple):
    """What encoding a text gives, under the name that the tokenizers library has for it."""

    ids: list[int]


class SentencePieceModel:
    """A SentencePiece model and its added tokens, with the methods of tokenizers.Tokenizer that Tokenizer calls.

    Added tokens are found in a text before SentencePiece sees it, as transformers does, and so are the control pieces
    (<s>, </s>). What stands between them is encoded by SentencePiece; only the beginning of a text gets the space that
    the model puts before it (legacy: what follows an added token too, as transformers did before 4.31).
    """

    def __init__(
        self,
        content: bytes,
        added: Mapping[int, AddedToken],
        *,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        legacy: bool = False,
    ):
        """content: that of tokenizer.model; added: tokens by their ids, also those of pieces that other files rename.

        before, after: ids that encoding adds (BOS, EOS). Raises ValueError or RuntimeError if content is no model.
        """
        if not content:
            raise ValueError("it is empty")
        self._begins = sentencepiece.SentencePieceProcessor(model_proto=content)
        spaced = self._begins.normalize("x").startswith(_SPACE)
        self._goes_on = self._begins
        if spaced and not legacy:
            self._goes_on = sentencepiece.SentencePieceProcessor(model_proto=content + _NO_PREFIX)
        self._pieces = [self._begins.id_to_piece(i) for i in range(self._begins.vocab_size())]
        # Rows that other files name differently are theirs.
        self._added = {
            i: AddedToken(piece, special=True, normalized=False)
            for i, piece in enumerate(self._pieces)
            if self._begins.is_control(i) or self._begins.is_unknown(i)
        } | dict(added)
        self._before, self._after = list(before), list(after)
        # Its one word stands for all that is no added token.
        self._splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        self._splitter.add_tokens(list(self._added.values()))
        ids = {token.content: i for i, token in self._added.items()}
        found = self._splitter.get_added_tokens_decoder()
        self._split_ids = {split_id: ids[token.content] for split_id, token in found.items()}
        strip = [decoders.Strip(" ", 1, 0)] if spaced else []
        unspell = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        self._decoder = decoders.Sequence([*unspell, *strip])

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool = True) -> list[Encoding]:
        """Encodes texts, each with what goes before and after it unless add_special_tokens is False."""
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        return [Encoding([*before, *self._ids(text), *after]) for text in texts]

    def _ids(self, text: str) -> list[int]:
        split = self._splitter.encode(text)
        ids: list[int] = []
        for part, (start, stop) in zip(split.ids, split.offsets, strict=True):
            if part:
                ids.append(self._split_ids[part])
            else:
                ids += (self._goes_on if start else self._begins).encode(text[start:stop])
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; special tokens are spelled out unless they are skipped, ids of no token say nothing."""
        texts = []
        for i in ids:
            if (token := self._added.get(i)) is not None:
                texts += [] if token.special and skip_special_tokens else [token.content]
            elif 0 <= i < len(self._pieces):
                texts.append(self._pieces[i])
        return self._decoder.decode(texts)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by their ids, control pieces among them."""
        return dict(self._added)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its text, None if there is none."""
        for i, added in self._added.items():
            if added.content == token:
                return i
        i = self._begins.piece_to_id(token)
        return None if i == self._begins.unk_id() or i in self._added else i

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """How many tokens there are."""
        return len(self._pieces) + sum(i >= len(self._pieces) for i in self._added) * with_added_tokens

    def largest_id(self) -> int:
        """The largest id of a token."""
        return max([len(self._pieces) - 1, *self._added])


def special_pieces(content: bytes) -> dict[str, str]:
    """The pieces that a model itself uses as bos, eos, pad and unk, by role; a role that it lacks is left out."""
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
    return {role: model.id_to_piece(i) for role, i in ids.items() if i >= 0}
