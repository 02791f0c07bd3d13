"""Every problem that is timed, in one place. N rows, M x K full weight, m x k active block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.rows import format_sizes

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class LinearShape:
    """A prefix linear layer: x (N, k), weight (M, K), y (N, m)."""

    N: int
    M: int
    K: int
    m: int
    k: int

    def __str__(self) -> str:
        return format_sizes(N=self.N, M=self.M, K=self.K, m=self.m, k=self.k)

    @property
    def gemm_flops(self) -> int:
        """Operations of one product, a multiply-add counted as 2; a step has three."""
        return 2 * self.N * self.m * self.k


@dataclass(frozen=True)
class ConvShape:
    """The first c of C channels, in and out: x (N, c, pixels, pixels), a kernel of taps x taps.

    ``groups`` is 1, or C for a depthwise convolution; ``nhwc`` is 1 in channels-last memory.
    """

    N: int
    C: int
    c: int
    pixels: int
    taps: int
    groups: int
    nhwc: int

    def __str__(self) -> str:
        return format_sizes(
            N=self.N, C=self.C, c=self.c, pixels=self.pixels, taps=self.taps, groups=self.groups,
            nhwc=self.nhwc,
        )  # fmt: skip

    @property
    def padding(self) -> int:
        """What keeps the size."""
        return self.taps // 2

    @property
    def active_groups(self) -> int:
        """Of the active channels."""
        return 1 if self.groups == 1 else self.c

    @property
    def block(self) -> list[int]:
        """The active weight's shape."""
        return [self.c, self.c if self.groups == 1 else 1, self.taps, self.taps]

    @property
    def geometry(self) -> list[int]:
        """As the ops take it."""
        return [1, 1, self.padding, self.padding, 1, 1, self.active_groups]

    @property
    def weights(self) -> int:
        """Elements of the active weight."""
        return math.prod(self.block)

    @property
    def images(self) -> int:
        """Elements of x, and of y."""
        return self.N * self.c * self.pixels**2

    @property
    def flops(self) -> int:
        """Operations of one of a step's three convolutions, a multiply-add counted as 2."""
        return 2 * self.N * self.pixels**2 * self.weights


@dataclass(frozen=True)
class NormShape:
    """A norm over the first k of K features: x (N, k)."""

    N: int
    K: int
    k: int

    def __str__(self) -> str:
        return format_sizes(N=self.N, K=self.K, k=self.k)


@dataclass(frozen=True)
class ChannelNormShape:
    """A norm over the first c of C channels: x (N, c, H, H)."""

    N: int
    C: int
    c: int
    H: int

    def __str__(self) -> str:
        return format_sizes(N=self.N, C=self.C, c=self.c, H=self.H)

    @property
    def elements(self) -> int:
        """Of x."""
        return self.N * self.c * self.H * self.H


@dataclass(frozen=True)
class EmbeddingShape:
    """A look-up of N rows of a (V, K) table, the first k features of each."""

    N: int
    V: int
    K: int
    k: int

    def __str__(self) -> str:
        return format_sizes(N=self.N, V=self.V, K=self.K, k=self.k)


@dataclass(frozen=True)
class AdamWShape:
    """An optimizer step over the first (m, k) block of each of several (M, K) parameters."""

    tensors: int
    M: int
    K: int
    m: int
    k: int

    def __str__(self) -> str:
        return format_sizes(tensors=self.tensors, M=self.M, K=self.K, m=self.m, k=self.k)


@dataclass(frozen=True)
class ModelShape:
    """A sub-model of the residual MLP (12 blocks, 8 widths of a hidden size of 256)."""

    batch: int
    depth: int
    width: int

    def __str__(self) -> str:
        return format_sizes(batch=self.batch, depth=self.depth, width=self.width)


@dataclass(frozen=True)
class ResNetShape:
    """A sub-model of cPreResNet20: ``width`` of ``WIDTH`` parts of the channels of each layer."""

    batch: int
    pixels: int
    WIDTH: int
    width: int

    def __str__(self) -> str:
        return format_sizes(**vars(self))


@dataclass(frozen=True)
class BlockShape:
    """A part of a LLaMA block; GROUP query heads share a key-value head."""

    batch: int
    length: int
    HIDDEN: int
    HEADS: int
    GROUP: int
    FFN: int
    hidden: int
    heads: int
    ffn: int

    def __str__(self) -> str:
        return format_sizes(**vars(self))


@dataclass(frozen=True)
class RaggedShape:
    """A batch of N rows of ``submodels`` sub-models in equal parts; sizes rise in equal steps.

    For sixteen sub-models the mean of m * k is 0.37 of M * K.
    """

    N: int
    M: int
    K: int
    submodels: int

    def runs(self) -> list[tuple[int, int, int]]:
        """``(rows, m, k)`` of each sub-model, largest first."""
        count = self.submodels
        return [
            (self.N // count, self.M * i // count, self.K * i // count) for i in range(count, 0, -1)
        ]

    def __str__(self) -> str:
        return format_sizes(N=self.N, M=self.M, K=self.K, submodels=self.submodels)


@dataclass(frozen=True)
class AttentionShape:
    """Attention of B samples over the first ``heads`` of H heads of D features; S rows.

    With several sub-models the samples' heads fall from there in as many equal steps.
    """

    B: int
    H: int
    S: int
    D: int
    heads: int
    submodels: int = 1

    def counts(self) -> list[int]:
        """Active heads of each sample, the most first."""
        steps = [sample * self.submodels // self.B for sample in range(self.B)]
        return [max(1, self.heads * (self.submodels - i) // self.submodels) for i in steps]

    @property
    def flops(self) -> int:
        """Operations of both products and, in backward, of five; a multiply-add counted as 2."""
        return 7 * 2 * self.S * self.S * self.D * sum(self.counts())

    def __str__(self) -> str:
        return format_sizes(
            B=self.B, H=self.H, S=self.S, D=self.D, heads=self.heads, submodels=self.submodels
        )


@dataclass(frozen=True)
class HeadShape:
    """E exits of N rows of k features under a head of V words."""

    E: int
    N: int
    k: int
    V: int

    def __str__(self) -> str:
        return format_sizes(E=self.E, N=self.N, k=self.k, V=self.V)


def _fractions_of(N: int, M: int, K: int) -> list[LinearShape]:
    return [LinearShape(N, M, K, int(M * f), int(K * f)) for f in FRACTIONS]


# Training step of one layer. The first list is the one with goals.
LINEAR_STEP_CPU = [shape for N in (32, 256) for shape in _fractions_of(N, 2048, 2048)]
LINEAR_STEP_GPU = [
    shape for M in (2048, 4096) for N in (512, 4096, 16384) for shape in _fractions_of(N, M, M)
] + [LinearShape(4096, 4096, 4096, 1001, 999)]

MODEL_STEP = [ModelShape(64, depth, width) for depth, width in ((12, 8), (6, 4), (12, 2), (3, 8))]
RESNET_STEP = [ResNetShape(32, 32, 16, width) for width in (4, 8, 12, 16)]
RESNET_QUICK = ResNetShape(2, 8, 16, 4)
BLOCK = [
    BlockShape(4, 64, 768, 12, 3, 2048, 768 * part // 4, 12 * part // 4, 2048 * part // 4)
    for part in (1, 2, 4)
]
BLOCK_QUICK = BlockShape(2, 8, 48, 4, 2, 64, 24, 2, 32)
RAGGED = [RaggedShape(256, 2048, 2048, 16)]
ATTENTION_CPU = [AttentionShape(8, 8, 256, 64, *h) for h in ((2,), (8,), (8, 8))]
ATTENTION_GPU = [
    AttentionShape(16, 16, S, D, *heads)
    for S, D in ((1024, 64), (4096, 128))
    for heads in ((4,), (16,), (16, 16))
]
ATTENTION_QUICK = AttentionShape(2, 2, 8, 32, 2, 2)
RAGGED_QUICK = RaggedShape(32, 64, 64, 4)
HEAD, HEAD_QUICK = HeadShape(8, 512, 576, 49152), HeadShape(3, 16, 8, 100)
ANYTIME = [ModelShape(batch, 12, 8) for batch in (1, 64, 360, 1024)]

CONV_STEP_CPU = [
    *(ConvShape(32, 64, c, 32, 3, 1, 0) for c in (8, 16, 32)),
    ConvShape(32, 64, 16, 32, 3, 1, 1),
    ConvShape(32, 64, 16, 32, 1, 1, 0),
    ConvShape(32, 64, 16, 32, 3, 64, 1),
]
CONV_STEP_GPU = [
    *(ConvShape(64, 256, c, 28, 3, 1, 1) for c in (32, 128, 256)),
    ConvShape(64, 512, 128, 28, 1, 1, 1),
    ConvShape(64, 512, 128, 28, 3, 512, 1),
]
CONV_QUICK = ConvShape(2, 8, 4, 8, 3, 1, 0)

# Kernels alone.
CONV_CPU = [
    ConvShape(32, 64, 16, 32, 3, 1, 1),
    ConvShape(32, 64, 16, 32, 1, 1, 0),
    ConvShape(32, 64, 16, 32, 3, 64, 1),
]
CONV_GPU = [
    *(ConvShape(64, 256, c, 28, 3, 1, 1) for c in (32, 127, 256)),
    *(ConvShape(64, 512, c, 28, 1, 1, 1) for c in (127, 512)),
    *(ConvShape(64, 512, c, 56, taps, 512, 1) for c in (127, 512) for taps in (3, 5)),
]
LINEAR_CPU = [LinearShape(64, 1024, 1024, m, m) for m in (128, 511, 1024)]
LINEAR_GPU = [
    *(LinearShape(4096, M, M, M, M) for M in (1024, 2048, 4096, 8192)),
    *(LinearShape(N, 4096, 4096, m, m) for N in (512, 16384) for m in (512, 2048, 4096)),
    *(LinearShape(4096, M, M, M // 8, M // 8) for M in (2048, 8192)),
    LinearShape(4096, 4096, 4096, 2047, 2045),
    LinearShape(513, 1025, 1023, 777, 333),
]
NORM_CPU = [NormShape(256, 1024, k) for k in (127, 1024)]
NORM_GPU = [
    NormShape(N, K, k)
    for N, K, k in (
        (4096, 1024, 1024),
        (16384, 4096, 512),
        (16384, 4096, 4096),
        (4096, 8192, 8192),
        (4096, 8192, 4097),
    )
]
CHANNEL_NORM_CPU = [ChannelNormShape(16, 64, c, 16) for c in (15, 64)]
CHANNEL_NORM_GPU = [ChannelNormShape(128, 256, c, 32) for c in (64, 127, 256)]
EMBEDDING_CPU = [EmbeddingShape(1024, 8192, 512, k) for k in (63, 512)]
EMBEDDING_GPU = [EmbeddingShape(16384, 32768, 4096, k) for k in (512, 2047, 4096)]
ADAMW_CPU = [AdamWShape(4, 1024, 1024, m, m) for m in (128, 513, 1024)]
ADAMW_GPU = [
    *(AdamWShape(8, 4096, 4096, int(4096 * f), int(4096 * f)) for f in FRACTIONS),
    AdamWShape(8, 4096, 4096, 2047, 1001),
]

# Host time of a call: so little work that only the way to it is timed.
HOST_LINEAR = [LinearShape(1, 2048, 2048, 64, 64)]
