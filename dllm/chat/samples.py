"""Conversations and the filmstrip that the report shows of a run.

Everything is a function of checkpoint and settings: the same ones give the same file.
"""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from dllm.chat.render import Piece, pieces
from dllm.chat.session import Message
from dllm.config import GenerateSettings, SampleConfig
from dllm.language_model import DiffusionLM
from dllm.sampling.edits import EditCanvas


def samples(model: DiffusionLM, config: SampleConfig) -> dict:
    """{"run", "conversations": [[turn, ...], ...], "film": {...}}; see `converse` and `film`."""
    return {
        "run": config.run,
        "conversations": converse(model, config.conversations, config.generation),
        "film": film(model, config.film_prompt, config.generation),
    }


def converse(model: DiffusionLM, conversations: list[list[str]], settings: GenerateSettings) -> list[list[Message]]:
    """The conversations with the model's answers as {"role", "content"} turns; the n-th turns are one batch."""
    talks: list[list[Message]] = [[] for _ in conversations]
    for number in range(max(map(len, conversations), default=0)):
        open_ones = [i for i, turns in enumerate(conversations) if number < len(turns)]
        for i in open_ones:
            talks[i].append({"role": "user", "content": conversations[i][number]})
        for i, answer in zip(open_ones, model.generate([talks[i] for i in open_ones], settings), strict=True):
            talks[i].append({"role": "assistant", "content": answer})
    return talks


def film(model: DiffusionLM, prompt: str, settings: GenerateSettings) -> dict:
    """One answer from all masks to text: {"prompt", "answer", "frames": [{"step", "nfe", "tokens"}]}.

    A frame shows the positions of the finished answer, without what follows its end; tokens are {"text", "state",
    "confidence"}. A pass that changed nothing there has no frame. If tokens are inserted and deleted, those of a
    frame are at their places in the finished answer, and the places of tokens still to come are masked.
    """
    canvases = list(model.stream([[{"role": "user", "content": prompt}]], settings))
    response = canvases[-1].responses()[0]
    size = max(1, model.answer_length(response, settings.stop))
    decode = model.backbone.tokenizer.decode
    frames, shown = [], None
    for previous, canvas in zip([None, *canvases], canvases, strict=False):
        shown_pieces = pieces(canvas, decode, previous=previous)
        if isinstance(canvas, EditCanvas):
            shown_pieces = _in_place(shown_pieces, canvas.responses()[0], response)
        shown_pieces = shown_pieces[:size]
        # frames are compared by what is known: the state `new` alone would make every frame differ
        known = [None if piece.state == "masked" else piece.text for piece in shown_pieces]
        if known != shown:
            frames.append({"step": canvas.step, "nfe": canvas.nfe, "tokens": [_token(piece) for piece in shown_pieces]})
            shown = known
    return {"prompt": prompt, "answer": model.decode(response, settings.stop).strip(), "frames": frames}


def _in_place(pieces_of: list[Piece], tokens: list[int], response: list[int]) -> list[Piece]:
    """The pieces of `tokens` at the positions that the finished response has for them; masked ones elsewhere."""
    placed = [Piece("", "masked", 0.0)] * len(response)
    for step in Levenshtein.opcodes(tokens, response):
        if step.tag in ("equal", "replace"):
            placed[step.dest_start : step.dest_end] = pieces_of[step.src_start : step.src_end]
    return placed


def _token(piece: Piece) -> dict:
    return {"text": piece.text, "state": piece.state, "confidence": round(piece.confidence, 4)}
