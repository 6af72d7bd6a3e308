"""How authors decode their models, restated with plain loops: the oracles of `test_published_loops.py`.

One row at a time, every pass over all that is there, no cache. `scores` are the logits [L, V] of a row of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Scores = Callable[[list[int]], Tensor]


def llada21(
    scores: Scores,
    prompt: list[int],
    new_tokens: int,
    *,
    mask: int,
    end: int,
    block: int = 32,
    threshold: float = 0.7,
    editing_threshold: float = 0.5,
    post_steps: int = 16,
    early_stop: bool = True,
) -> tuple[list[int], int]:
    """What LLaDA2.1 answers at temperature 0, up to and with its end, and the passes that takes.

    A block at a time, from that of the last prompt tokens on, all of it masks at first. A pass fills in the masks whose
    best token is likelier than `threshold`, or else the likeliest one, and replaces the filled ones by another token
    that is likelier than `editing_threshold`. A block without masks gets `post_steps` further passes at most, and is
    finished when one of them changes nothing. Blocks behind are not there yet, so that no pass sees them.

    Sources: arXiv:2602.08676, algorithm 1; `generate` beside the weights; the algorithm `JointThreshold` of sglang.
    """
    passes, blocks = 0, math.ceil((len(prompt) + new_tokens) / block)
    row = [*prompt, *[mask] * (blocks * block - len(prompt))]
    for number in range(len(prompt) // block, blocks):
        begin, stop = number * block, (number + 1) * block
        mine = [place for place in range(begin, stop) if place >= len(prompt)]
        after_masks = 0
        while True:
            masked = [place for place in mine if row[place] == mask]
            after_masks += not masked
            if after_masks > post_steps:
                break
            p = scores(row[:stop]).softmax(-1)
            passes += 1
            best = {place: (float(p[place].max()), int(p[place].argmax())) for place in mine}
            written = {place for place in masked if best[place][0] > threshold}
            if masked and not written:
                written = {max(masked, key=lambda place: (best[place][0], -place))}
            edited = {
                place
                for place in set(mine) - set(masked)
                if best[place][0] > editing_threshold and best[place][1] != row[place]
            }
            for place in written | edited:
                row[place] = best[place][1]
            if not masked and not edited:
                break
        if early_stop and end in row[len(prompt) : stop]:
            break
    answer = row[len(prompt) : len(prompt) + new_tokens]
    return answer[: answer.index(end) + 1] if early_stop and end in answer else answer, passes


def dreamon(
    scores: Scores,
    row: list[int],
    new_tokens: int,
    *,
    mask: int,
    expand: int,
    delete: int,
    rule: str = "entropy",
) -> tuple[list[int], int]:
    """What DreamOn makes of a row with masks at temperature 0, and the passes that takes.

    In a pass the surest mask takes its most probable token; a token for deletion is then taken out, one for expansion
    becomes two masks. It has no chance in a row of `new_tokens` more than the given ones, nor after twice as many
    expansions as there may be tokens from the first mask on. `scores` have a token for each position, whatever the
    model predicts.

    Sources: arXiv:2602.01326, and the generation code beside the weights, with one token per pass.
    """
    row, passes = list(row), 0
    most = len(row) - row.count(mask) + new_tokens
    budget = 2 * (most - row.index(mask))
    while mask in row:
        logits = scores(row)
        if len(row) == most or budget == 0:
            logits[:, expand] -= 1e9
        p, passes = logits.softmax(-1), passes + 1
        best = p.topk(2, -1).values
        sure = {
            "confidence": best[:, 0],
            "margin": best[:, 0] - best[:, 1],
            "entropy": (p * (p + 1e-10).log()).sum(-1),
        }[rule]
        place = max((place for place, token in enumerate(row) if token == mask), key=lambda place: float(sure[place]))
        token = int(p[place].argmax())
        if token == delete:
            del row[place]
        elif token == expand:
            row[place : place + 1] = [mask, mask]
            budget -= 1
        else:
            row[place] = token
    return row, passes
