"""A measured row to make others from, and the rows that are committed."""

from pathlib import Path

from bench.rows import Row

COMMITTED = Path(__file__).parent.parent.parent / "bench" / "results" / "cpu" / "benchmarks.csv"
ROW = Row(
    kernel="linear_step",
    provider="ours",
    mode="train",
    sizes="N=32 M=2048 K=2048 m=256 k=256",
    dtype="float32",
    cache="hot",
    metric="ms",
    p20=0.25,
    p50=0.5,
    p80=0.625,
    samples=193,
    flops=12582912,
    bytes=2818048,
    device='Processor, "quoted", of two\nlines',
    threads=2,
    torch="2.13.0+cpu",
    commit="0123456789ab-dirty",
    date="2026-01-31",
)
