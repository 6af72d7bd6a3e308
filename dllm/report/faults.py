"""The faults of the published pipeline, and what the corrected recipe does instead."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, what it costs, and what we do instead."""

    name: str
    happens: str
    matters: str
    corrected: str


FAULTS = (
    Fault(
        "F1",
        "Weights are trained in bfloat16 without a float32 copy.",
        "A small Adam step rounds to nothing: large weights stand still (claims 1 to 3).",
        "float32 master weights; bfloat16 only inside the passes.",
    ),
    Fault(
        "F2",
        "For likelihoods, context and continuation are cut apart after special tokens were added.",
        "One answer token is lost and a separator is scored in its place.",
        "No special tokens; context and continuation are tokenized apart.",
    ),
    Fault(
        "F3",
        "Generation leaves a separator between the prompt and the canvas.",
        "The model sees a prompt unlike any it was trained on.",
        "The prompt is exactly the one of training and chat.",
    ),
    Fault(
        "F4",
        "Likelihoods are summed in bfloat16.",
        "Near-ties of letter tasks go to the first option.",
        "Log-probabilities in float32.",
    ),
    Fault(
        "F5",
        "Gradient accumulation scales the loss, and each device counts its own targets.",
        "The result depends on how many devices ran it.",
        "One normalisation over the global batch.",
    ),
    Fault(
        "F6",
        "Every evaluation of the loss draws fresh masks.",
        "Noise between points hides small differences.",
        "Masks keyed by example: every evaluation meets the same noise.",
    ),
    Fault(
        "F7",
        "Two slices of one split may overlap.",
        "Test rows are trained on.",
        "Slices of one split are cut without overlap.",
    ),
    Fault(
        "F8",
        "LAMBADA's accuracy needs a greedy check that was switched off.",
        "Nobody can tell how the printed number was made.",
        "The greedy match is computed, and named.",
    ),
    Fault(
        "F9",
        "Block diffusion draws one noise level for a whole sequence.",
        "The loss is not the one of the paper.",
        "One noise level per block.",
    ),
    Fault(
        "F10",
        "No version is pinned and tables are typed by hand.",
        "No number can be traced to a run.",
        "Pinned revisions; every number carries its run, seed, commit and digests.",
    ),
    Fault(
        "F11",
        "All examples of a benchmark's prompt stand in a single turn of the user.",
        "The model sees a conversation unlike any it was trained on.",
        "A turn for each example's question and for its answer.",
    ),
)
