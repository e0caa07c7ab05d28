"""Tokens as they come, shown as text: only whole characters, and nothing of a stop string.

Ours beside DecodeStream of the library tokenizers, because that holds broken characters back without limit, cannot be
told that the text ends, and knows no stop strings.
"""

from collections.abc import Sequence

from longlora_jax.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what stands for the bytes of a character that has not all come
_PATIENCE = 8  # tokens; no character takes more, so what is still broken then stays so


class TextStream:
    """The text of one answer: push() its tokens one by one, show what comes back, then finish().

    stopped: whether a stop string came; it and what follows it are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._ids: list[int] = []
        # Tokens [context, shown) are decoded again with the new ones: a tokenizer may treat the first one in a way of
        # its own, such as to drop the space before it.
        self._context = self._shown = 0
        self._held = ""  # text that may be the head of a stop string

    def push(self, token: int) -> str:
        """Takes one token; returns what can be shown now, which may be nothing."""
        self._ids.append(int(token))
        new = self._new()
        if new.endswith(_BROKEN) and len(self._ids) - self._shown < _PATIENCE:
            return ""
        return self._take(new)

    def finish(self) -> str:
        """Returns what was held back and is text after all."""
        rest = self._take(self._new()) + ("" if self.stopped else self._held)
        self.text += self._held if not self.stopped else ""
        self._held = ""
        return rest

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)[len(before) :]

    def _take(self, new: str) -> str:
        """Whole characters: what is free of stop strings is shown, the possible head of one waits."""
        if self.stopped:
            return ""
        if new:
            self._context, self._shown = self._shown, len(self._ids)
        ready = self._held + new
        ends = [at for at in map(ready.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            ready, self._held = ready[: min(ends)], ""
        else:
            held = max((n for s in self._stop for n in range(1, len(s)) if ready.endswith(s[:n])), default=0)
            ready, self._held = ready[: len(ready) - held], ready[len(ready) - held :]
        self.text += ready
        return ready
