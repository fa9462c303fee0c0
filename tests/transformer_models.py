"""Hugging Face transformers, tiny and built from a config: nothing is downloaded.

Every case is one function that builds a model, its inputs as a dict of keywords, and what is
expected of it. Models that return one tensor called `logits` are used as they are; the others in a
wrapper such as a user would write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import Tensor, nn

F64 = torch.float64
VOCABULARY = 23
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
VISION = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
VISION |= {"num_attention_heads": 2, **IMAGE}
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()  # CrossEntropyLoss ignores the label -100


@dataclass(frozen=True)
class Case:
    """One model with its data.

    Attributes:
        model: What is traced.
        inputs: n -> a batch of n data, by keyword.
        targets: inputs -> their targets.
        loss: What the targets are for.
        expected: Structures by pattern; every parameter that none fits has Kronecker factors.
        structure: The argument of `fxkfac.trace`.
        coupled: One datum's prediction depends on the others'.
        tolerance: How far off gradients may be.
    """

    model: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    targets: Callable[[dict[str, Tensor]], Tensor]
    loss: nn.Module
    expected: Mapping[str, str]
    structure: Mapping[str, str] = field(default_factory=dict)
    coupled: bool = False
    tolerance: float = 1e-9

    def structure_of(self, name: str) -> str:
        """What a parameter is expected to have."""
        fits = (kind for pattern, kind in self.expected.items() if fnmatchcase(name, pattern))
        return next(fits, "kronecker")

    def data(self, n: int, start: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """The data from `start` to `n`."""
        inputs = self.inputs(n)
        targets = self.targets(inputs)
        return {key: t[start:] for key, t in inputs.items()}, targets[start:]


class NextToken(nn.Module):
    """Logits of the next token, classes along axis 1 as CrossEntropyLoss wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits[:, :-1].movedim(-1, 1)


class PerPosition(nn.Module):
    """Logits of every position, classes along axis 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits.movedim(-1, 1)


class Output(nn.Module):
    """One of a model's outputs, by name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Tensor) -> Tensor:
        return getattr(self.model(**inputs), self.name)


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case; it is the same in every run, and the caller's random state stays."""

    def seeded() -> Case:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            made = build()
            made.model.to(F64).eval()
            for p in made.model.parameters():  # no bias is zero, and no scale is one
                p.add_(0.1 * torch.randn_like(p))
        return made

    CASES[build.__name__] = seeded
    return seeded


def tokens(n: int, length: int = 6, seed: int = 0) -> Tensor:
    """Tokens that are none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n, length), generator=generator)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def text(n: int) -> dict[str, Tensor]:
    """Tokens without padding."""
    return {"input_ids": tokens(n), "attention_mask": torch.ones(n, 6, dtype=torch.long)}


def padded(n: int) -> dict[str, Tensor]:
    """Tokens with padding on the right, another number of them for each datum."""
    real = torch.arange(6) < (6 - torch.arange(n) % 4).unsqueeze(1)
    return {"input_ids": tokens(n) * real, "attention_mask": real.long()}


def translation(n: int) -> dict[str, Tensor]:
    """Source with padding, and target."""
    return {**padded(n), "decoder_input_ids": tokens(n, 5, seed=1)}


def pixels(n: int) -> dict[str, Tensor]:
    """Images."""
    return {"pixel_values": numbers(n, 3, 8, 8)}


def next_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """The next token at every position but the last; -100 where that is padding."""
    ids = inputs["input_ids"]
    if "attention_mask" not in inputs:
        return ids[:, 1:]
    return ids.masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]


def labels(inputs: Mapping[str, Any]) -> Tensor:
    """One of three classes for each datum."""
    return torch.arange(len(next(iter(inputs.values())))) % 3


def words(inputs: Mapping[str, Tensor]) -> Tensor:
    """A token for each position of the decoder."""
    return tokens(len(inputs["decoder_input_ids"]), 5, seed=2)


def zeros_of(d: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Targets of d zeros."""
    return lambda inputs: torch.zeros(len(next(iter(inputs.values()))), d, dtype=F64)


@case
def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=12, **SPECIAL
    )
    model = NextToken(transformers.GPT2LMHeadModel(config))
    return Case(model, padded, next_labels, CE, {"*ln_?.weight": "diagonal"})


@case
def llama() -> Case:
    """Grouped-query attention, rotary positions, root-mean-square norms, SwiGLU."""
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False, **SPECIAL)
    model = NextToken(transformers.LlamaForCausalLM(config))
    return Case(model, padded, next_labels, CE, {"*norm.weight": "diagonal"})


@case
def mixtral() -> Case:
    """Experts as one batched product; a loop over the experts that are hit is no graph."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(
        **SIZES, **experts, **SPECIAL, num_key_value_heads=2, use_cache=False
    )
    config._experts_implementation = "batched_mm"
    model = NextToken(transformers.MixtralForCausalLM(config))
    return Case(model, padded, next_labels, CE, {"*norm.weight": "diagonal"})


@case
def mamba() -> Case:
    """A state-space model: `A_log` enters an exp, so its block is the exact diagonal.

    It scans in float32 inside, whatever its dtype: float32's digits are what gradients agree in.
    """
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False
    )
    model = NextToken(transformers.MambaForCausalLM(config))
    return Case(
        model,
        lambda n: {"input_ids": tokens(n)},
        next_labels,
        CE,
        {"*norm*.weight": "diagonal", "*A_log": "diagonal", "*mixer.D": "diagonal"},
        {"*A_log": "diagonal"},
        tolerance=1e-5,
    )


@case
def bert() -> Case:
    config = transformers.BertConfig(**SIZES, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    return Case(model, padded, labels, CE, {"*LayerNorm.weight": "diagonal"})


@case
def vit() -> Case:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))
    return Case(model, pixels, labels, CE, {"*layernorm*.weight": "diagonal"})


@case
def swin() -> Case:
    """Windows, half of them shifted, each with a table of relative positions."""
    config = transformers.SwinConfig(
        image_size=8,
        patch_size=2,
        embed_dim=8,
        depths=[2],
        num_heads=[2],
        window_size=2,
        num_labels=3,
    )
    model = transformers.SwinForImageClassification(config)
    return Case(model, pixels, labels, CE, {"*norm*.weight": "diagonal"})


@case
def t5() -> Case:
    """Relative positions are looked up and added to the scores, behind the mask of padding."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        use_cache=False,
        decoder_start_token_id=0,
    )
    model = PerPosition(transformers.T5ForConditionalGeneration(config))
    return Case(model, translation, words, CE, {"*layer_norm.weight": "diagonal"})


@case
def whisper() -> Case:
    """Convolutions over a spectrogram, then an encoder and a decoder."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=6,
        max_target_positions=12,
        use_cache=False,
        decoder_start_token_id=1,
        **heads,
        **layers,
        **SPECIAL,
    )
    model = PerPosition(transformers.WhisperForConditionalGeneration(config))

    def spectrograms(n: int) -> dict[str, Tensor]:
        return {"input_features": numbers(n, 4, 12), "decoder_input_ids": tokens(n, 5, seed=1)}

    return Case(model, spectrograms, words, CE, {"*layer_norm.weight": "diagonal"})


@case
def wav2vec2() -> Case:
    """The weight of one convolution is normed: it has the block, and the two it is made of none.

    Nothing is masked here, so that the embedding of masked places has a curvature of zero.
    """
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = PerPosition(transformers.Wav2Vec2ForCTC(config))
    return Case(
        model,
        lambda n: {"input_values": numbers(n, 40)},
        lambda inputs: tokens(len(inputs["input_values"]), 9, seed=2),
        CE,
        {"*parametrizations*": "derived", "*norm.weight": "diagonal", "*spec_embed": "diagonal"},
        {"*parametrizations*": "derived"},
    )


def _clip() -> transformers.CLIPConfig:
    words = {**SIZES, "num_attention_heads": 2, **SPECIAL}
    return transformers.CLIPConfig(text_config=words, vision_config=VISION, projection_dim=5)


CLIP_NORMS = {"*norm*.weight": "diagonal", "*layrnorm.weight": "diagonal"}


@case
def clip_text() -> Case:
    config = _clip().text_config
    config.projection_dim = 5
    model = Output(transformers.CLIPTextModelWithProjection(config), "text_embeds")
    return Case(model, text, zeros_of(5), MSE, CLIP_NORMS)


@case
def clip_vision() -> Case:
    config = _clip().vision_config
    config.projection_dim = 5
    model = Output(transformers.CLIPVisionModelWithProjection(config), "image_embeds")
    return Case(model, pixels, zeros_of(5), MSE, CLIP_NORMS)


@case
def clip() -> Case:
    """Every image is compared with every text: the data are coupled. The scale enters an exp."""
    model = Output(transformers.CLIPModel(_clip()), "logits_per_image")
    return Case(
        model,
        lambda n: {**text(n), **pixels(n)},
        lambda inputs: torch.arange(len(inputs["input_ids"])),
        CE,
        {**CLIP_NORMS, "*logit_scale": "dense"},
        {"*logit_scale": "dense"},
        coupled=True,
    )
