"""Widths of the models whose transformer block is measured."""

from dataclasses import dataclass

from bench.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Model:
    """Widths of a model whose block is measured, and what one video costs it."""

    shape: Shape
    mlp_dim: int
    layers: int
    source: str

    @property
    def dim(self) -> int:
        return self.shape.heads * self.shape.head_dim


MODELS = {
    "wan-1.3b": Model(SHAPES["wan-1.3b-480p"], 8960, 30, "Wan 2.1 1.3B"),
    "wan-14b": Model(SHAPES["wan-14b-720p"], 13824, 40, "Wan 2.1 14B"),
    "paper-410m": Model(SHAPES["paper-410m"], 4096, 24, "VSA paper 410M; widths assumed"),
    "tiny": Model(SHAPES["tiny"], 256, 2, "for --cpu"),
}
