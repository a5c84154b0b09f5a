"""Transformers by shape: published sizes as `hf:` names, built offline from transformers' configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sim.errors import InputError, require
from sim.hints import error_line, unknown

if TYPE_CHECKING:  # names and sizes need no torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class HfShape:
    """Sizes of a transformer. `seq` is the default number of tokens, `positions` the largest."""

    family: Literal["bert", "roberta", "gpt2", "gpt2-lm", "llama"]
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    seq: int
    kv_heads: int = 0
    tied: bool = True

    def tokens(self, name: str, seq: int | None) -> int:
        """The length asked for, or the default one. Raises InputError beyond `positions`."""
        if seq is None:
            return min(self.seq, self.positions)
        require(
            seq <= self.positions,
            f"seq {seq}: {name!r} has {self.positions} positions; ask for at most that many",
        )
        return seq


_LLAMA_1B = HfShape("llama", 2048, 16, 32, 8192, 128256, 131072, 512, 8, True)
# Default lengths are DeepPlan's: 384 for BERT and RoBERTa, 1024 for GPT-2.
SHAPES = {
    "hf:bert-base": HfShape("bert", 768, 12, 12, 3072, 30522, 512, 384),
    "hf:bert-large": HfShape("bert", 1024, 24, 16, 4096, 30522, 512, 384),
    "hf:roberta-base": HfShape("roberta", 768, 12, 12, 3072, 50265, 512, 384),
    "hf:roberta-large": HfShape("roberta", 1024, 24, 16, 4096, 50265, 512, 384),
    "hf:gpt2": HfShape("gpt2", 768, 12, 12, 3072, 50257, 1024, 1024),
    "hf:gpt2-medium": HfShape("gpt2", 1024, 24, 16, 4096, 50257, 1024, 1024),
    "hf:gpt2-lm": HfShape("gpt2-lm", 768, 12, 12, 3072, 50257, 1024, 1024),
    "hf:llama": _LLAMA_1B,
    "hf:llama-1b": _LLAMA_1B,
    "hf:llama-8b": HfShape("llama", 4096, 32, 32, 14336, 128256, 8192, 512, 8, False),
    "hf:llama-70b": HfShape("llama", 8192, 80, 64, 28672, 128256, 8192, 512, 8, False),
}
LLAMA_OPTIONS = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "positions", "tied")

_ROBERTA_PADDING = 2
"""RoBERTa's positions start behind its padding index, so its table has two rows more."""


MOST_LAYERS = 1000
"""Of a shape, twelve times the deepest that ships: more takes minutes to trace."""
LARGEST_OPTION = 10**7
"""Of a shape's other sizes: beyond any that was trained."""


def hf_shape(name: str) -> HfShape:
    """The sizes behind `hf:bert-base` or `hf:llama-1b:hidden=1024,layers=4,heads=16,kv_heads=4,ffn=4096,tied=yes`.

    Raises InputError where the name, an option or a size is none, and where the heads do not divide the width.
    """
    base, _, options = name.removeprefix("hf:").partition(":")
    shape = SHAPES.get(f"hf:{base}")
    if shape is None:
        raise unknown("model", name, SHAPES, "sim models")
    if not options:
        return shape
    require(
        shape.family == "llama", f"model {name!r}: hf:{base} takes no options; only the hf:llama shapes do"
    )
    seen: set[str] = set()
    for option in options.split(","):
        key, _, value = option.partition("=")
        require(key not in seen, f"model {name!r}: {key} is given twice; give it once")
        seen.add(key)
        if key not in LLAMA_OPTIONS:
            raise unknown(f"model {name!r}: option", key, LLAMA_OPTIONS)
        shape = replace(shape, **{key: _option(name, key, value)})  # type: ignore[arg-type]  # checked there
    width, rest = divmod(shape.hidden, shape.heads)
    require(
        rest == 0 and width % 2 == 0,
        f"model {name!r}: hidden={shape.hidden} over heads={shape.heads} must be an even whole number",
    )
    require(
        shape.heads % shape.kv_heads == 0,
        f"model {name!r}: heads={shape.heads} must be a multiple of kv_heads={shape.kv_heads}",
    )
    return shape


def _option(name: str, key: str, value: str) -> int | bool:
    if key == "tied":
        require(value in ("yes", "no"), f"model {name!r}: tied={value}: must be yes or no")
        return value == "yes"
    most = MOST_LAYERS if key == "layers" else LARGEST_OPTION
    digits = value.isascii() and value.isdigit() and len(value) < 10 and 0 < int(value) <= most
    require(digits, f"model {name!r}: {key}={value}: must be a whole number from 1 to {most}")
    return int(value)


def make_transformer(name: str, shape: HfShape) -> nn.Module:
    """The module, made under the caller's default device and dtype. Raises InputError without transformers."""
    try:
        import transformers  # noqa: PLC0415 - optional dependency
    except Exception as error:  # a half-installed one raises anything
        raise InputError(
            f"model {name!r} needs transformers, which cannot be imported ({error_line(error)}); "
            "pip install 'deepplan[hf]'"
        ) from error
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
    }
    plain, causal = transformers.AutoModel, transformers.AutoModelForCausalLM
    if shape.family == "bert":
        return _from_config(plain, transformers.BertConfig(**sizes), encoder=True)
    if shape.family == "roberta":
        sizes["max_position_embeddings"] += _ROBERTA_PADDING
        config = transformers.RobertaConfig(**sizes, type_vocab_size=1, layer_norm_eps=1e-5)
        return _from_config(plain, config, encoder=True)
    if shape.family == "llama":
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied, use_cache=False
        )
        return _from_config(causal, config, encoder=False)
    config = transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.ffn,
        n_positions=shape.positions,
        use_cache=False,
    )
    return _from_config(causal if shape.family == "gpt2-lm" else plain, config, encoder=False)


def _from_config(model: Any, config: Any, *, encoder: bool) -> nn.Module:
    """A transformer that calls scaled_dot_product_attention and never asks a tensor for its value.

    transformers reads position and mask values on the host to find out whether a mask is needed: impossible on the meta
    device and in a CUDA graph, and a stall of the host anywhere. An attention function registered without a mask function
    makes no mask at all; causal models are causal by a flag. transformers 4 lets only some models use that registry.
    """
    try:
        from transformers import AttentionInterface  # noqa: PLC0415 - optional dependency
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: F401, PLC0415
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415

        AttentionInterface.register("deepplan_sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
        made = model.from_config(config, attn_implementation="deepplan_sdpa")
    except (ImportError, KeyError, ValueError):
        made = model.from_config(config, attn_implementation="eager" if encoder else "sdpa")
        if encoder:
            made.config.pad_token_id = None  # else a warning about padding reads token values
    made.tie_weights()  # transformers 5.0 leaves it to loading
    module: nn.Module = made
    return module
