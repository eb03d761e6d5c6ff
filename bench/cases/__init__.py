"""More than one attention call: the kernels around the fine stage, a transformer block, a GPU session."""
