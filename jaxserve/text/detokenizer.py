"""Token ids of one sample in, text out, as it is generated: whole characters only, cut at the first stop string.

    token ids ─► IncrementalDetokenizer ─► StopChecker ─► delta
                 holds incomplete UTF-8    holds what may become a stop string

All three work token by token (or character by character) inside, so text, stop and `tokens_used` never depend on how
tokens are grouped into calls.
"""

from os.path import commonprefix

from jaxserve.request import SamplingParams
from jaxserve.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders put where bytes are not (yet) a character
MAX_PENDING = 16  # tokens without settled text; a character has at most 4 bytes, so at most 4 tokens
PROMPT_TAIL = 8  # prompt tokens decoded as context at first; doubled until they hold text


class OutputText:
    """The text of one sample: what the engine's front end feeds tokens to.

    `text` is everything released so far; `tokens_used` counts the appended tokens that belong to the output, which
    are those up to and including the one that completed a stop string. Both stay as they are once a stop was found.
    With `params.detokenize` false only `tokens_used` counts.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int]):
        assert not isinstance(params.stop, str)  # SamplingParams made it a tuple
        self.tokens_used = 0
        self._min_tokens = params.min_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer, params, prompt_token_ids) if params.detokenize else None
        self._stops = StopChecker(tuple(params.stop or ()), params.include_stop_str_in_output)
        self._released = _GrowingText()

    @property
    def text(self) -> str:
        return self._released.text

    def append(self, token_ids: list[int]) -> tuple[str, str | None]:
        """Return the text these tokens release, and the stop string that ended the sample, if one did.

        A stop string counts when its last character comes from a token after the first `min_tokens`. Of several, the
        one that ends first wins; of those that end together, the longest.
        """
        start = self._released.mark()
        for token in token_ids:
            if self._stops.found is not None:
                break
            self.tokens_used += 1
            if self._detokenizer is not None:
                new = self._detokenizer.append([token])
                if new:
                    self._released.add(self._stops.append(new, armed=self.tokens_used > self._min_tokens))
        return self._released.since(start), self._stops.found

    def flush(self) -> str:
        """At the end of the sample: release what was held as a possible stop string; drop an incomplete character."""
        start = self._released.mark()
        self._released.add(self._stops.finish())
        return self._released.since(start)


class IncrementalDetokenizer:
    """Turns a growing list of token ids into a growing text; deltas concatenate to `text`.

    The text is `decode(prompt + output)[len(decode(prompt)):]` less the incomplete character at its end, so the first
    generated token keeps its leading space. A character the prompt left incomplete belongs to the output.

    Method: decode a short window twice (Hugging Face text-generation-inference's prefix/read offsets), and take new
    text by length. `tokenizers.decoders.DecodeStream` does the same but fails where a decoder rewrites earlier text
    (byte fallback, "Invalid prefix"), repeats the prompt when that ends in U+FFFD, and slows down quadratically over
    long runs of invalid bytes.

        window = context (ids whose text is out) + pending (ids whose text is not, or not wholly)
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int]):
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._split_specials = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._last_was_special = bool(prompt_token_ids) and prompt_token_ids[-1] in tokenizer.special_ids
        self._context = self._prompt_tail(prompt_token_ids)
        self._pending: list[int] = []
        full = self._decode(self._context)
        self._shown = len(full.rstrip(REPLACEMENT))  # characters of the window's text that are out
        self._prompt_broken = full[self._shown :]  # shown as the prompt's, unless output completes the character
        self._settled = _GrowingText()

    @property
    def text(self) -> str:
        return self._settled.text

    def append(self, token_ids: list[int]) -> str:
        """Return the text that became final with these tokens ("" if none did)."""
        start = self._settled.mark()
        for token in token_ids:
            self._append_one(token)
        return self._settled.since(start)

    def _append_one(self, token: int) -> None:
        if self._split_specials:
            special = token in self._tokenizer.special_ids
            if special and self._last_was_special:
                self._context, self._pending, self._shown = [], [], 0  # no decoder can put a space before it now
            self._last_was_special = special
        self._pending.append(token)
        full = self._decode(self._context + self._pending)
        settled = full.rstrip(REPLACEMENT)
        if len(settled) > self._shown:
            self._emit(settled[self._shown :])
            self._shown = len(settled)
            if len(settled) == len(full):
                self._context, self._pending = self._pending, []
                self._shown = len(self._decode(self._context))
        if len(self._pending) > MAX_PENDING:
            self._settle(full)

    def _settle(self, full: str) -> None:
        """Shorten a window in which no text became final for `MAX_PENDING` tokens.

        Where both sides of a cut decode on their own to the text they have together, no character spans the cut, and
        the left side is final even if it is broken. Random bytes and skipped special tokens get here.
        """
        for cut in range(len(self._pending) - 1, 0, -1):
            left, right = self._pending[:cut], self._pending[cut:]
            head, tail = self._decode(self._context + left), self._decode(right)
            if head + tail == full:
                settled_tail = tail.rstrip(REPLACEMENT)
                self._emit((head + settled_tail)[self._shown :])
                left_text = self._decode(left)
                if left_text:  # else the old context goes on keeping the leading space of what follows
                    self._context, head = left, left_text
                self._pending, self._shown = right, len(head) + len(settled_tail)
                return
        self._emit(full[self._shown :])
        self._context, self._pending = self._pending, []
        self._shown = len(self._decode(self._context))

    def _emit(self, text: str) -> None:
        if self._prompt_broken and text:
            common = len(commonprefix([text, self._prompt_broken]))
            self._prompt_broken = self._prompt_broken[common:] if common == len(text) else ""
            text = text[common:]
        self._settled.add(text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _prompt_tail(self, prompt: list[int]) -> list[int]:
        size = PROMPT_TAIL
        while size < len(prompt) and not self._decode(prompt[-size:]).rstrip(REPLACEMENT):
            size *= 2
        return prompt[-size:]


class _GrowingText:
    """A text that only grows, piece by piece; joined when somebody reads it."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def add(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def mark(self) -> int:
        """Where the text ends now, for `since`; good until the next look at `text`."""
        return len(self._pieces)

    def since(self, mark: int) -> str:
        return "".join(self._pieces[mark:])


class StopChecker:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may be the start of one.

    One Knuth-Morris-Pratt automaton per stop string: time is linear in the text, whatever the strings are. `found` is
    the stop string that ended the text, or None.
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool):
        self.found: str | None = None
        self._stops = stops
        self._include_stop = include_stop
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string that end the text so far
        self._held = ""

    def append(self, text: str, armed: bool = True) -> str:
        """Return the text that is now safe to release. Stop strings that end while not `armed` do not count."""
        assert self.found is None
        if not self._stops:
            return text
        text, start = self._held + text, len(self._held)
        for end in range(start, len(text)):
            longest = self._advance(text[end])
            if longest and armed:
                self.found, self._held = longest, ""
                return text[: end + 1] if self._include_stop else text[: end + 1 - len(longest)]
        cut = len(text) - max(self._matched)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Release what is held: no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str:
        """Feed one character to every automaton; return the longest stop string that ends with it, or ""."""
        longest = ""
        for i, stop in enumerate(self._stops):
            borders, matched = self._borders[i], self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                longest = max(longest, stop, key=len)
                matched = borders[matched]
            self._matched[i] = matched
        return longest


def _borders(stop: str) -> list[int]:
    """i32[len + 1]: for every prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0, 0]
    for char in stop[1:]:
        length = borders[-1]
        while length and stop[length] != char:
            length = borders[length]
        borders.append(length + 1 if stop[length] == char else 0)
    return borders
