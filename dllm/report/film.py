"""The denoising film: frames of one canvas, aligned so that each token keeps its place."""

from dataclasses import dataclass

MASK = "░"
SHADES = 5
"""Steps of confidence that a reader can tell apart."""


@dataclass(frozen=True)
class Token:
    """One position of one frame: what to print, in how many letters' width, and how sure the model was."""

    text: str
    state: str
    shade: int
    width: int
    confidence: float


@dataclass(frozen=True)
class Still:
    """One canvas of the film."""

    step: int
    nfe: int
    tokens: tuple[Token, ...]

    @property
    def plain(self) -> str:
        """The canvas as text: every masked position a row of blocks as wide as the token to come."""
        return "".join(MASK * token.width if token.state == "masked" else token.text for token in self.tokens)


def frames(film: dict, *, limit: int = 8) -> tuple[Still, ...]:
    """At most `limit` frames, first and last among them, evenly spread. Raises ValueError if there are no frames."""
    raw = film.get("frames")
    if not raw:
        raise ValueError("the denoising film has no frames; rule 'sample' makes it again.")
    count = min(limit, len(raw))
    chosen = sorted({round(i * (len(raw) - 1) / max(1, count - 1)) for i in range(count)})
    places = max(len(frame["tokens"]) for frame in raw)
    widths = [_width(raw, place) for place in range(places)]
    shown, hidden = [], set[int]()
    for index in chosen:
        shown.append(_frame(raw[index], widths, hidden=hidden))
        hidden = {place for place, token in enumerate(raw[index]["tokens"]) if token["state"] == "masked"}
    return tuple(shown)


def _width(raw: list[dict], place: int) -> int:
    """Letters that the widest revealed token at this position needs."""
    texts = [f["tokens"][place] for f in raw if place < len(f["tokens"])]
    return max([len(visible(token["text"])) for token in texts if token["state"] != "masked"], default=1)


def _frame(raw: dict, widths: list[int], *, hidden: set[int]) -> Still:
    """One frame. A token is new if the frame shown before, perhaps several steps earlier, had it masked (`hidden`)."""
    tokens = []
    for place, (token, width) in enumerate(zip(raw["tokens"], widths, strict=False)):
        state = "masked" if token["state"] == "masked" else "new" if place in hidden else "kept"
        confidence = float(token.get("confidence") or 0.0)
        shade = min(SHADES - 1, max(0, int(confidence * SHADES)))
        tokens.append(Token(visible(token["text"]), state, shade, max(1, width), confidence))
    return Still(int(raw["step"]), int(raw["nfe"]), tuple(tokens))


def visible(text: str) -> str:
    """A token's text on one line: line breaks and tabs become signs, other control characters vanish."""
    text = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter for letter in text if letter.isprintable())
