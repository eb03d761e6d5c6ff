"""Plans and launches, in csrc/bindings.cpp. Addresses are device pointers as integers, 0 for none."""

from collections.abc import Sequence

class ArgumentError(ValueError): ...
class LaunchError(RuntimeError): ...

class TensorMapPlan:
    @property
    def address(self) -> int: ...
    @property
    def element_type(self) -> str: ...
    @property
    def extents(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def box(self) -> tuple[int, ...]: ...
    @property
    def swizzle(self) -> int: ...

class LaunchPlan:
    @property
    def kernel(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def block(self) -> tuple[int, int, int]: ...
    @property
    def cluster(self) -> tuple[int, int, int]: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def maps(self) -> list[TensorMapPlan]: ...
    @property
    def params(self) -> bytes: ...

class CubeGrid:
    def __init__(self, *, video_shape: Sequence[int], cube: Sequence[int]) -> None: ...
    @property
    def num_cubes(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def cube_tokens(self, cube: int) -> list[int]: ...
    def valid_slots(self, cube: int) -> int: ...

class TokenTensor:
    def __init__(self, *, address: int, shape: Sequence[int], strides: Sequence[int], dtype: str) -> None: ...

class StridedTensor:
    def __init__(self, *, address: int, strides: Sequence[int]) -> None: ...

class Gate:
    def __init__(self, *, values: StridedTensor, scalar: int, factor: float) -> None: ...

class FineBackwardArguments:
    def __init__(
        self,
        *,
        query: TokenTensor,
        key: TokenTensor,
        value: TokenTensor,
        grad_out: TokenTensor,
        grad_query: TokenTensor,
        grad_key: TokenTensor,
        grad_value: TokenTensor,
        q_grid: CubeGrid,
        kv_grid: CubeGrid,
        kv_schedule: Schedule,
        q_schedule: Schedule,
        block_sizes: int,
        q_block_sizes: int,
        lse: int,
        delta: int,
        row_terms: int,
        grad_query_sums: int,
        adds_directly: bool,
        choose_by: int,
        dq_pooled: int,
        dk_pooled: int,
        dv_pooled: int,
        pooled_q_grid: CubeGrid,
        pooled_kv_grid: CubeGrid,
        scale: float,
        num_sms: int,
    ) -> None: ...

class Schedule:
    def __init__(self) -> None: ...

class ScheduleArguments:
    def __init__(
        self,
        *,
        kernel: str,
        batch: int,
        heads: int,
        head_dim: int,
        grid: CubeGrid,
        listed_grid: CubeGrid,
        block_sizes: int,
        counts: StridedTensor,
        entries: StridedTensor,
        max_blocks: int,
        offsets: int,
        compressed_entries: int,
        entries_per_head: int,
        num_sms: int,
    ) -> None: ...
    @property
    def stages(self) -> int: ...
    @stages.setter
    def stages(self, address: int) -> None: ...
    @property
    def stage_counts(self) -> int: ...
    @stage_counts.setter
    def stage_counts(self, address: int) -> None: ...
    @property
    def thin(self) -> int: ...
    @thin.setter
    def thin(self, address: int) -> None: ...
    @property
    def num_counts(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def num_thin(self) -> int: ...
    @property
    def num_tasks(self) -> int: ...
    @property
    def schedule(self) -> Schedule: ...

def plan_fine_forward(
    *,
    query: TokenTensor,
    key: TokenTensor,
    value: TokenTensor,
    out: TokenTensor,
    out_fine: TokenTensor,
    store_out_fine: bool,
    q_grid: CubeGrid,
    kv_grid: CubeGrid,
    coarse_grid: CubeGrid,
    schedule: Schedule,
    block_sizes: int,
    q_block_sizes: int,
    lse: int,
    coarse: int,
    gate_fine: Gate,
    gate_coarse: Gate,
    scale: float,
    num_sms: int,
) -> LaunchPlan: ...
def plan_pool(
    *, inputs: Sequence[TokenTensor], grid: CubeGrid, outputs: Sequence[int], num_sms: int
) -> LaunchPlan: ...
def plan_schedule(arguments: ScheduleArguments) -> LaunchPlan: ...
def plan_select(
    *,
    query: TokenTensor,
    key: TokenTensor,
    topk: int,
    scale: float,
    counts: int,
    indices: int,
) -> LaunchPlan: ...
def plan_select_large(
    *,
    query: TokenTensor,
    key: TokenTensor,
    topk: int,
    scale: float,
    counts: int,
    indices: int,
) -> LaunchPlan: ...
def plan_select_small(
    *,
    query: TokenTensor,
    key: TokenTensor,
    topk: int,
    scale: float,
    counts: int,
    indices: int,
) -> LaunchPlan: ...
def plan_transpose_index(
    *,
    shape: Sequence[int],
    kv_num_blocks: StridedTensor,
    kv_indices: StridedTensor,
    num_kv_blocks: int,
    q_offsets: int,
    q_indices: int,
) -> LaunchPlan: ...
def plan_combine_backward(
    *,
    grad_out: TokenTensor,
    out_fine: TokenTensor,
    q_grid: CubeGrid,
    coarse_grid: CubeGrid,
    block_sizes: int,
    grad_lse: StridedTensor,
    coarse: int,
    gate_fine: Gate,
    gate_coarse: Gate,
    grad_fine: int,
    delta: int,
    grad_coarse: int,
    grad_gate_fine: int,
    grad_gate_coarse: int,
    scalar_fine: int,
    scalar_coarse: int,
) -> LaunchPlan: ...
def plan_delta(
    *,
    grad_out: TokenTensor,
    out: TokenTensor,
    grid: CubeGrid,
    block_sizes: int,
    grad_lse: StridedTensor,
    delta: int,
    num_sms: int,
) -> LaunchPlan: ...
def plan_fine_backward_kv(arguments: FineBackwardArguments) -> LaunchPlan: ...
def plan_fine_backward_q(arguments: FineBackwardArguments) -> LaunchPlan: ...
def plan_start_grad_query(arguments: FineBackwardArguments) -> LaunchPlan: ...
def plan_fine_backward_fused(arguments: FineBackwardArguments) -> LaunchPlan: ...
def plan_finish_grad_query(arguments: FineBackwardArguments) -> LaunchPlan: ...
def launch(*, plan: LaunchPlan, device: int, stream: int) -> None: ...
def kernel_names() -> list[str]: ...
def cuda_version() -> int: ...
