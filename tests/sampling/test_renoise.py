"""DiffusionGemma: a tiny random one is sampled as transformers' own `generate` samples it, row by row."""

import io
import json
import math
from itertools import takewhile

import pytest
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

import dllm
from dllm.cli.main import main
from dllm.config import GenerateSettings
from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from dllm.models.load import load_backbone
from dllm.sampling.renoise import _NEW_STREAM, _START_STREAM, NO_TOKEN
from dllm.sampling.reveal import token_noise
from tests.toys import word_tokenizer

SIZE = 8
PROMPT = [12, 30, 17, 25, 14]
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "max_position_embeddings": 96, "sliding_window": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_experts": 4, "top_k_experts": 2,
    "moe_intermediate_size": 16, "initializer_range": 0.4,
}  # fmt: skip
VISION = {
    "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def save_tiny(place):
    """A tiny random checkpoint as the class saves it, with a tokenizer; returns its directory."""
    torch.set_num_threads(1)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eos>", "<turn|>", "<mask>"]})
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<turn|>{% endfor %}"
    ids = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), tokenizer.eos_token_id)
    text = TEXT | ids | {"vocab_size": len(tokenizer)}
    config = DiffusionGemmaConfig(text_config=text, vision_config=VISION, canvas_length=SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        DiffusionGemmaForBlockDiffusion(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def lm(directory):
    return dllm.load(directory)


class OurNumbers:
    """Gives transformers' loop our random numbers, for one row."""

    def __init__(self, monkeypatch, lm, prompt, seed=0):
        tokens = torch.tensor(prompt)
        self.key = keyed_hash(seed, token_hash(tokens))
        self.vocabulary, self.start, self.step, self.drew = lm.backbone.vocab_size, len(prompt) - SIZE, 0, False
        monkeypatch.setattr(theirs.EntropyBoundSampler, "initialize_canvas", self.canvas)
        monkeypatch.setattr(torch, "multinomial", self.draw)

    @property
    def positions(self):
        return torch.arange(self.start, self.start + SIZE)

    def canvas(self, *args, **kwargs):
        if self.drew:  # a pass draws tokens, then a canvas to renoise from
            self.drew = False
            noise = keyed_uniform(self.key, self.positions, self.step, _NEW_STREAM)
            self.step += 1
        else:
            self.start, self.step = self.start + SIZE, 0
            noise = keyed_uniform(self.key, self.positions, 0, _START_STREAM)
        return (noise * self.vocabulary).long()[None]

    def draw(self, p, num_samples):
        self.drew = True
        cumulative = p.cumsum(-1)
        noise = token_noise(self.key, self.positions, self.step)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, noise, right=True)


def ends(lm):
    return [lm.backbone.eos_id, lm.backbone.tokenizer.convert_tokens_to_ids("<turn|>")]


def up_to_the_end(lm, tokens):
    return list(takewhile(lambda token: token not in ends(lm), tokens))


def generated(lm, prompt, **options):
    """Tokens of transformers' own `generate` behind the prompt, up to their end."""
    out = lm.backbone.model.generate(torch.tensor([prompt]), eos_token_id=ends(lm), **options)
    return up_to_the_end(lm, out.sequences[0, len(prompt) :].tolist())


def ours(lm, prompt, **options):
    *_, canvas = lm.stream([prompt], GenerateSettings(**options))
    return up_to_the_end(lm, canvas.responses()[0])


@pytest.mark.parametrize("prompt", [PROMPT, [9], list(range(11, 31))])
def test_at_temperature_0_the_tokens_are_those_of_its_own_generate(lm, monkeypatch, prompt):
    """Its temperatures must be above 0, so they are next to it. Prompts are shorter and longer than the window."""
    OurNumbers(monkeypatch, lm, prompt)
    expected = generated(lm, prompt, max_new_tokens=24, t_min=0.0, t_max=1e-6)
    assert ours(lm, prompt, max_new_tokens=24) == expected and len(set(expected)) > 3


@pytest.mark.parametrize(
    ("temperature", "bound", "passes", "seed"), [(0.8, 2.0, 7, 1), (0.8, 0.1, 7, 2), (0.05, 100.0, 20, 1)]
)
def test_with_the_same_random_numbers_it_accepts_renoises_and_stops_as_its_own_generate(
    lm, monkeypatch, temperature, bound, passes, seed
):
    OurNumbers(monkeypatch, lm, PROMPT, seed)
    monkeypatch.setattr(lm.backbone.model.generation_config, "confidence_threshold", 2.0)
    options = {"sampler_config": theirs.EntropyBoundSamplerConfig(entropy_bound=bound), "max_denoising_steps": passes}
    expected = generated(lm, PROMPT, max_new_tokens=16, t_min=temperature / 2, t_max=temperature, **options)
    mine = {"temperature": temperature, "entropy_bound": bound, "steps": 2 * passes, "seed": seed, "max_new_tokens": 16}
    assert ours(lm, PROMPT, **mine) == expected and len(expected) == 16
    frames = list(lm.stream([PROMPT], GenerateSettings(**mine)))
    shown = torch.stack([frame.masked[0, len(PROMPT) : len(PROMPT) + SIZE] for frame in frames])
    taken_back = (shown[:-1] < shown[1:]).any()
    assert taken_back if bound < 100 else not taken_back, "all are accepted at once, or some are accepted and lost"
    stopped = frames[-1].nfe < 2 * (passes + 1)
    assert stopped == (bound == 100) and frames[-1].done.item()
    assert frames[-1].nfe == lm.answers([PROMPT], GenerateSettings(**mine))[0].passes


def test_a_row_does_not_depend_on_its_batch_mates(lm):
    settings = GenerateSettings(max_new_tokens=12, temperature=0.9, steps=10)
    prompts = [PROMPT, [9], PROMPT[::-1], []]
    *_, together = lm.stream(prompts[:3], settings)
    for row, prompt in enumerate(prompts[:3]):
        *_, alone = lm.stream([prompt], settings)
        assert together.responses()[row] == alone.responses()[0]
        tokens = alone.responses()[0]
        assert lm.answers([prompt], settings)[0].ids == tuple(tokens[: lm.answer_length(tokens)])
    assert lm.generate(prompts[:3], settings) == [lm.generate([prompt], settings)[0] for prompt in prompts[:3]]


def test_every_frame_has_tokens_of_the_vocabulary_or_none_and_the_last_has_no_hole(lm):
    frames = list(lm.stream([PROMPT, [9]], GenerateSettings(max_new_tokens=11, temperature=1.0, steps=8)))
    for frame in frames:
        response = torch.stack([frame.tokens[0, 5:16], frame.tokens[1, 1:12]])
        masked = torch.stack([frame.masked[0, 5:16], frame.masked[1, 1:12]])
        assert torch.equal(masked, response == NO_TOKEN) and response.max() < lm.backbone.vocab_size
        assert frame.tokens[0, :5].tolist() == PROMPT
    assert frames[0].masked.sum() == 22 and not frames[-1].masked.any() and frames[-1].done.all()
    canvases = math.ceil(11 / SIZE)
    assert frames[-1].nfe <= 8 + canvases, "at most the asked passes, and the encoder's"


def test_it_is_sampled_and_talked_to_from_the_command_line(directory, capsys, monkeypatch):
    words = ["--new-tokens", "8", "--temperature", "0.8", "--device", "cpu"]
    assert main(["sample", str(directory), "Who are you?", *words]) == 0
    said = capsys.readouterr().out
    assert main(["sample", str(directory), "Who are you?", *words]) == 0
    assert capsys.readouterr().out == said
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n/quit\n"))
    assert main(["chat", str(directory), "--new-tokens", "8", "--device", "cpu"]) == 0


def one_line(action) -> str:
    with pytest.raises(ValueError) as fault:
        action()
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_what_it_cannot_do_is_one_line(lm, directory, tmp_path):
    from dllm.exporting.export import export
    from dllm.models.inferred import entry_settings
    from tests.training.conftest import entry_for

    other = entry_for("llama")
    assert "are <mask>, <eos>, own; set them in the entry" in one_line(lambda: load_backbone(directory, entry=other))
    assert "and not by `dllm tune`" in one_line(lambda: entry_settings(directory))
    assert "renoise fills no masks" in one_line(lambda: lm.infill(["a [MASK]"]))
    assert "give them this directory" in one_line(lambda: export(directory, output=tmp_path / "out"))
    for options, words in {
        "reveal_rule": "margin", "reuse": "prefix", "guidance": 1.0,
    }.items():  # fmt: skip
        settings = GenerateSettings(**{options: words}, max_new_tokens=8)
        assert f"{options} = {words!r} means nothing to algorithm = 'renoise'" in one_line(
            lambda settings=settings: lm.generate([PROMPT], settings)
        )
    assert "steps = 1 is less than the 2 canvases" in one_line(
        lambda: lm.generate([PROMPT], GenerateSettings(max_new_tokens=16, steps=1))
    )
    assert "take 101 positions, the model has 96" in one_line(
        lambda: lm.generate([PROMPT], GenerateSettings(max_new_tokens=89))
    )


def test_a_checkpoint_that_lacks_a_tensor_is_one_line(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    del weights["model.decoder.self_conditioning.gate_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lack model.decoder.self_conditioning.gate_proj.weight" in one_line(lambda: dllm.load(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": "none"}))
    assert "config.json: cannot be used" in one_line(lambda: dllm.load(tmp_path))
