"""Problems in words, for people who read the report."""

from __future__ import annotations

import functools
import string

from bench.rows import parse_sizes

NAMES = {
    "linear_step": "linear",
    "model_step": "the demo's network,",
    "resnet_step": "cPreResNet20,",
    "transformer_step": "LLaMA block,",
    "conv_step": "convolution,",
    "attention_each": "attention forward+backward,",
}
"""Families under another name than their own and their mode."""
WORDS = (
    "{M}x{K}, {rows}, {m}x{k} active",
    "depth {depth}, width {width}, batch {batch}",
    "width {width} of {WIDTH}, batch {batch}, {pixels}x{pixels} pixels",
    "hidden {hidden} of {HIDDEN}, {heads} of {HEADS} heads ({GROUP} to a group), "
    "ffn {ffn} of {FFN}, {batch} x {length} tokens",
    "{taps}x{taps}, {c} of {C} channels, groups {groups}, batch {N}, {pixels}x{pixels} pixels, "
    "{layout}",
    "{heads} of {H} heads of {D}, {B} x {S} tokens, head counts {submodels}",
    "{E} exits, {N} tokens, {k} features, {V} words",
    "{M}x{K}, {rows} of {submodels} sub-models",
    "{k} of {K} features, {rows}",
    "{c} of {C} channels, batch {N}, {H}x{H} pixels",
    "{k} of {K} features, {N} of {V} ids",
    "{tensors} tensors {M}x{K}, {m}x{k} active",
)
"""Problems in words, each for the sizes that it names."""
DERIVED = {"rows": "N", "layout": "nhwc"}
"""Words that are made from a size."""


def name_of(kernel: str, mode: str) -> str:
    """A family and a mode of it, as a title begins."""
    return NAMES.get(kernel, f"{kernel} {mode}")


def in_words(text: str) -> str:
    """A row's sizes in words; as they are where no words are known."""
    sizes = sizes_of(text)
    form = _form(frozenset(sizes))
    if form is None:
        return text
    layout = "channels-last" if sizes.get("nhwc") else "contiguous"
    return form.format(rows=rows_of(sizes.get("N", 1)), layout=layout, **sizes)


@functools.cache
def _form(names: frozenset[str]) -> str | None:
    """The words that name these sizes."""
    for words in WORDS:
        fields = [field for _, field, _, _ in string.Formatter().parse(words) if field]
        if {DERIVED.get(field, field) for field in fields} == names:
            return words
    return None


def rows_of(count: int) -> str:
    """A count of rows."""
    return f"{count} row{'s' if count != 1 else ''}"


def sizes_of(text: str) -> dict[str, int]:
    """The counts among the words of a row's sizes; other words are left out."""
    words = [word for word in text.split() if word.partition("=")[2].isdecimal()]
    return parse_sizes(" ".join(words))
