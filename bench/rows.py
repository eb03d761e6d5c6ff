"""The rows of a result file: one measured (or failed) case of one backend."""

import csv
import json
import os
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

OPS = (
    "fine", "op", "coarse_forward", "coarse_backward", "pool", "combine_backward", "transpose_index", "block",
    "block_attention", "roofline",
)  # fmt: skip
PASSES = ("fwd", "bwd", "fwd+bwd")
BACKENDS = ("vsa_cuda", "fa3", "cudnn", "fastvideo", "flex", "torch", "bench")
STATUSES = ("ok", "failed")


class RowError(ValueError):
    """A row that breaks the schema."""


@dataclass(kw_only=True)
class Row:
    """One row. Times in ms, clocks in MHz, power in W, temperature in degrees C, sizes in bytes.

    None means not known or not applicable. A failed row has an error above its tolerance, or a note that says
    what was raised, and no times.
    """

    op: str
    direction: str  # "pass" in files
    backend: str
    backend_version: str
    library_sha256: str | None
    status: str
    case: str  # the shape's name, or what the roofline measured
    B: int | None = None
    H: int | None = None
    S: int | None = None
    D: int | None = None
    video_shape: list[int] | None = None
    cube: list[int] | None = None
    layout: str | None = None
    dtype: str | None = None
    topk: int | None = None
    blocks_total: int | None = None
    pairs: int | None = None
    pattern: str | None = None
    seed: int | None = None
    overlap: float | None = None  # loads per pair in groups of 2 cubes along time; 1 is no sharing
    gates: str | None = None
    deterministic: bool | None = None
    ms_median: float | None = None
    ms_min: float | None = None
    ms_spread: float | None = None  # 90th minus 10th percentile
    iterations: int | None = None
    timer: str | None = None  # graph | events | clock
    l2: str | None = None  # warm | cold
    tflops: float | None = None  # executed 64x64 pairs
    tflops_real: float | None = None  # real tokens only
    tflops_ratio_to_dense_fa3: float | None = None
    speedup_over_dense_fa3: float | None = None
    mfu: float | None = None  # tflops over the datasheet's tensor peak
    limit: str | None = None  # the ceiling that binds
    limit_fraction: float | None = None  # time at that ceiling over ms_median
    limits_ms: dict[str, float] | None = None  # least time by each ceiling
    tb_per_s: float | None = None  # what the roofline's bandwidth rows measured
    error: float | None = None
    tolerance: float | None = None
    peak_bytes: int | None = None
    device: str | None = None
    driver: str | None = None
    torch: str | None = None
    cuda: str | None = None
    nvcc: str | None = None
    clock_sm_mhz_before: float | None = None
    clock_sm_mhz_after: float | None = None
    clock_memory_mhz_before: float | None = None
    clock_memory_mhz_after: float | None = None
    power_w_before: float | None = None
    power_w_after: float | None = None
    temperature_c_before: float | None = None
    temperature_c_after: float | None = None
    commit: str | None = None
    dirty: bool | None = None
    csrc_sha256: str | None = None
    command: str | None = None
    date: str | None = None
    note: str | None = None

    def __post_init__(self):
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), _HINTS[field.name])
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RowError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.status == "failed" and self.ms_median is not None:
            raise RowError("ms_median: got a time in a failed row, expected none")
        if self.status == "ok" and self.error is not None and not self.error <= (self.tolerance or 0.0):
            raise RowError(f"error: got {self.error} above tolerance {self.tolerance} in a row that is ok")

    @classmethod
    def from_dict(cls, values: dict) -> "Row":
        """A row of a file. Raises RowError naming a field that is missing, unknown or of the wrong type."""
        values = dict(values)
        values["direction"] = values.pop("pass", None)
        names = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - names), sorted(names - set(values))
        if unknown or missing:
            raise RowError(f"row: unknown fields {unknown}, missing fields {missing}")
        return cls(**values)

    def to_dict(self) -> dict:
        return {"pass" if name == "direction" else name: value for name, value in asdict(self).items()}

    @property
    def title(self) -> str:
        """The case's name in tables, with what sets the row apart from others of its name."""
        return f"{self.case}, L2 cold" if self.l2 == "cold" else self.case

    @property
    def key(self) -> tuple:
        """What the row measures, whoever measured it and when."""
        return (
            self.op, self.direction, self.backend, self.case, self.B, self.H, self.S, self.D, self.dtype,
            self.topk, self.pattern, self.gates, self.deterministic, self.l2,
        )  # fmt: skip


_HINTS = typing.get_type_hints(Row)
_CHOICES = {"op": OPS, "direction": PASSES, "backend": BACKENDS, "status": STATUSES}


def _check_type(name: str, value, hint) -> None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        plain = typing.get_origin(option) or option
        if isinstance(value, bool) and plain is not bool:
            continue
        if isinstance(value, plain) or (plain is float and isinstance(value, int)):
            return
    raise RowError(f"{name}: got {value!r} ({type(value).__name__}), expected {hint}")


def read_json(path: Path) -> list[Row]:
    """Rows of a file made by append_json. Raises RowError naming the file and the row."""
    rows = []
    for number, values in enumerate(json.loads(Path(path).read_text())):
        try:
            rows.append(Row.from_dict(values))
        except RowError as error:
            raise RowError(f"{path}, row {number}: {error}") from None
    return rows


def append_json(path: Path, rows: list[Row]) -> None:
    """Appends to a JSON list, creating the file; a run that is killed leaves the rows written before."""
    path = Path(path)
    known = json.loads(path.read_text()) if path.exists() else []
    lines = ",\n".join(json.dumps(values) for values in known + [row.to_dict() for row in rows])
    _replace(path, f"[\n{lines}\n]\n")


def append_csv(path: Path, rows: list[Row]) -> None:
    """Appends to a CSV file, creating it with a header; lists and dicts are JSON in their cell."""
    path = Path(path)
    new = not path.exists()
    names = ["pass" if field.name == "direction" else field.name for field in fields(Row)]
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if new:
            writer.writeheader()
        for row in rows:
            cells = row.to_dict().items()
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in cells})


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
