"""Video Sparse Attention for NVIDIA Hopper GPUs, forward and backward, with a CPU reference."""

from vsa_cuda.functional import block_sparse_attention, from_block_mask, video_sparse_attention
from vsa_cuda.geometry import topk_from_sparsity
from vsa_cuda.info import info
from vsa_cuda.nn import VideoSparseAttention

__version__ = "0.1.0"

__all__ = [
    "VideoSparseAttention",
    "block_sparse_attention",
    "from_block_mask",
    "info",
    "topk_from_sparsity",
    "video_sparse_attention",
]
