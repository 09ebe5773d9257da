"""A user's text as text: the special tokens that it names are read as their characters."""

import re
import secrets
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from e5v_jax.prompts import TEXT_SLOT, any_of

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast

NO_TOKEN = -1
"""The id where characters of a text would have become a special token's after all."""


class LiteralTokenizer:
    """A copy of a tokenizer to which a special token is one only where the template says it.

    The rule: a prompt whose text names no special token is tokenised whole, by the tokenizer
    itself, as the reference does. One whose text does is tokenised whole, too, by this copy, which
    differs in one thing: special tokens have names that no text can guess. :meth:`mark` gives them
    to what the template says before the text goes in. So the template's tokens stay the same ids
    and hard boundaries, and there are no seams at which the rest would be split differently.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", special: Collection[str]) -> None:
        """``special`` are the strings that mean something else to the model than their characters.

        Those that ``tokenizer`` does not know as tokens are characters to it, and so they are here.

        Raises ValueError: the tokenizer's ids leave gaps, so that the copy's would be others'.
        """
        backend, added = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder
        special = {token.content for token in added.values()} & set(special)
        self._special = re.compile(any_of(special) or "(?!)")
        self._begins = re.compile(any_of({name[0] for name in special}) or "(?!)")
        self._beginnings = tuple({name[:i] for name in special for i in range(1, len(name))})
        self._is_open = lru_cache(maxsize=64)(self._leaves_open)  # many texts have one frame
        self._secret = f"{{{secrets.token_hex(8)}}}"
        self._copy = Tokenizer(backend.model)  # the vocabulary is shared
        self._copy.normalizer, self._copy.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        own: dict[int, int] = {}  # ids of the copy's added tokens -> the tokenizer's
        for old, token in sorted(added.items()):
            name = self.mark(token.content) if token.content in special else token.content
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            self._copy.add_tokens([AddedToken(name, **{f: getattr(token, f) for f in flags})])
            new = self._copy.token_to_id(name)
            assert new is not None  # it was just added
            if new != old and backend.model.id_to_token(new) is not None:
                raise ValueError(f"the tokenizer's vocabulary has gaps before its token {new}")
            own[new] = old
        # A vocabulary may hold its special tokens, and then merges might lead to one.
        reached = {old: NO_TOKEN for new, old in own.items() if new != old}
        reached.pop(tokenizer.unk_token_id, None)  # what no other token is for
        self._ids = reached | own
        # Names of such are looked for in what the normaliser leaves: it may make one of a text.
        self._always = backend.normalizer is not None and any(
            token.normalized for token in added.values() if token.content in special
        )

    def mark(self, frame: str) -> str:
        """``frame``, the words around a text, with the copy's names of special tokens."""
        return self._special.sub(lambda found: self._secret + found.group(), frame)

    def may_name(self, frame: str, text: str) -> bool:
        """Whether :meth:`is_needed` is worth asking: a name might begin in ``text`` or before it.

        ``frame`` has :data:`e5v_jax.prompts.TEXT_SLOT` for the text.
        """
        begins = self._begins.search(text) is not None
        return begins or self._always or self._is_open(frame)

    def _leaves_open(self, frame: str) -> bool:
        """Whether the words before a text might be the beginning of a name."""
        return any(words.endswith(self._beginnings) for words in frame.split(TEXT_SLOT)[:-1])

    def is_needed(self, filled: str, marked: str) -> bool:
        """Whether the tokenizer would find a special token that the frame does not say.

        ``filled`` and ``marked`` are the frame and the marked frame with the same text; a name may
        also stand where they meet.
        """
        return self._always or self.mark(filled) != marked

    def encode(self, marked: Sequence[str]) -> list[list[int]]:
        """The tokenizer's own ids of strings whose frames are marked, nothing added around them.

        They are ``NO_TOKEN`` where the vocabulary has a special token alone for a text's
        characters.
        """
        found = self._copy.encode_batch_fast(list(marked), add_special_tokens=False)
        return [[self._ids.get(i, i) for i in encoding.ids] for encoding in found]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends, in characters."""
        return self._copy.encode(text, add_special_tokens=False).offsets
