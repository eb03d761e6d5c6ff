// The Python face of csrc: plans and launches. No torch here: tensors come as addresses, sizes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch/check.h"
#include "launch/launch.h"
#include "launch/plan.h"
#include "launch/plan_combine_backward.h"
#include "launch/plan_delta.h"
#include "launch/plan_fine_backward.h"
#include "launch/plan_fine_forward.h"
#include "launch/plan_pool.h"
#include "launch/plan_schedule.h"
#include "launch/plan_select.h"
#include "launch/plan_transpose_index.h"

namespace py = pybind11;
using namespace py::literals;

namespace vsa {
namespace {

ElementType element_type(const std::string& dtype) {
  for (ElementType type : {ElementType::kBFloat16, ElementType::kFloat16, ElementType::kFloat32}) {
    if (dtype == name(type)) return type;
  }
  throw ArgumentError(text("dtype: got ", dtype, ", expected bfloat16, float16 or float32"));
}

TokenTensor token_tensor(uint64_t address, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides,
                         const std::string& dtype) {
  check_argument(shape[3] <= 1 || strides[3] == 1, "strides: got ", strides[3],
                 " elements between columns of head_dim, expected 1; make the tensor contiguous");
  TokenTensor tensor;
  tensor.address = address;
  tensor.type = element_type(dtype);
  tensor.batch = shape[0];
  tensor.tokens = shape[1];
  tensor.heads = shape[2];
  tensor.head_dim = shape[3];
  tensor.strides = {strides[0], strides[1], strides[2]};
  return tensor;
}

LaunchPlan fine_forward(const TokenTensor& query, const TokenTensor& key, const TokenTensor& value,
                        const TokenTensor& out, const TokenTensor& out_fine, bool store_out_fine,
                        const CubeGrid& q_grid, const CubeGrid& kv_grid, const CubeGrid& coarse_grid,
                        const Schedule& schedule, uint64_t block_sizes, uint64_t q_block_sizes, uint64_t lse,
                        uint64_t coarse, const Gate& gate_fine, const Gate& gate_coarse, double scale,
                        int num_sms) {
  FineForwardArguments arguments{query,          key,    value,   out,        out_fine,
                                 store_out_fine, q_grid, kv_grid, coarse_grid};
  arguments.schedule = schedule;
  arguments.block_sizes = block_sizes;
  arguments.q_block_sizes = q_block_sizes;
  arguments.lse = lse;
  arguments.coarse = coarse;
  arguments.gate_fine = gate_fine;
  arguments.gate_coarse = gate_coarse;
  arguments.scale = scale;
  arguments.num_sms = num_sms;
  return plan_fine_forward(arguments);
}

LaunchPlan transpose_index(std::array<int64_t, 4> shape, const StridedTensor& kv_num_blocks,
                           const StridedTensor& kv_indices, int64_t num_kv_blocks, uint64_t q_offsets,
                           uint64_t q_indices) {
  TransposeIndexArguments arguments;
  arguments.lists = make_block_lists(kv_num_blocks, kv_indices, num_kv_blocks);
  arguments.batch = shape[0];
  arguments.heads = shape[1];
  arguments.num_q_blocks = shape[2];
  arguments.max_blocks = shape[3];
  arguments.num_kv_blocks = num_kv_blocks;
  arguments.q_offsets = q_offsets;
  arguments.q_indices = q_indices;
  return plan_transpose_index(arguments);
}

LaunchPlan combine_backward(const TokenTensor& grad_out, const TokenTensor& out_fine, const CubeGrid& q_grid,
                            const CubeGrid& coarse_grid, uint64_t block_sizes, const StridedTensor& grad_lse,
                            uint64_t coarse, const Gate& gate_fine, const Gate& gate_coarse,
                            uint64_t grad_fine, uint64_t delta, uint64_t grad_coarse, uint64_t grad_gate_fine,
                            uint64_t grad_gate_coarse, uint64_t scalar_fine, uint64_t scalar_coarse) {
  CombineBackwardArguments arguments{grad_out, out_fine, q_grid,    coarse_grid, block_sizes,
                                     grad_lse, coarse,   gate_fine, gate_coarse};
  arguments.grad_fine = grad_fine;
  arguments.delta = delta;
  arguments.grad_coarse = grad_coarse;
  arguments.grad_gate_fine = grad_gate_fine;
  arguments.grad_gate_coarse = grad_gate_coarse;
  arguments.scalar_fine = scalar_fine;
  arguments.scalar_coarse = scalar_coarse;
  return plan_combine_backward(arguments);
}

LaunchPlan delta(const TokenTensor& grad_out, const TokenTensor& out, const CubeGrid& grid,
                 uint64_t block_sizes, const StridedTensor& grad_lse, uint64_t delta, int num_sms) {
  return plan_delta({grad_out, out, grid, block_sizes, grad_lse, delta, num_sms});
}

FineBackwardArguments fine_backward_arguments(
    const TokenTensor& query, const TokenTensor& key, const TokenTensor& value, const TokenTensor& grad_out,
    const TokenTensor& grad_query, const TokenTensor& grad_key, const TokenTensor& grad_value,
    const CubeGrid& q_grid, const CubeGrid& kv_grid, const Schedule& kv_schedule, const Schedule& q_schedule,
    uint64_t block_sizes, uint64_t q_block_sizes, uint64_t lse, uint64_t delta, uint64_t row_terms,
    uint64_t grad_query_sums, bool adds_directly, uint64_t choose_by, uint64_t dq_pooled, uint64_t dk_pooled,
    uint64_t dv_pooled, const CubeGrid& pooled_q_grid, const CubeGrid& pooled_kv_grid, double scale,
    int num_sms) {
  FineBackwardArguments arguments{query,    key,        value,  grad_out, grad_query,
                                  grad_key, grad_value, q_grid, kv_grid};
  arguments.kv_schedule = kv_schedule;
  arguments.q_schedule = q_schedule;
  arguments.block_sizes = block_sizes;
  arguments.q_block_sizes = q_block_sizes;
  arguments.lse = lse;
  arguments.delta = delta;
  arguments.row_terms = row_terms;
  arguments.grad_query_sums = grad_query_sums;
  arguments.adds_directly = adds_directly;
  arguments.choose_by = choose_by;
  arguments.dq_pooled = dq_pooled;
  arguments.dk_pooled = dk_pooled;
  arguments.dv_pooled = dv_pooled;
  arguments.pooled_q_grid = pooled_q_grid;
  arguments.pooled_kv_grid = pooled_kv_grid;
  arguments.scale = scale;
  arguments.num_sms = num_sms;
  return arguments;
}

ScheduleArguments schedule_arguments(const std::string& pass, int64_t batch, int64_t heads, int64_t head_dim,
                                     const CubeGrid& grid, const CubeGrid& listed_grid, uint64_t block_sizes,
                                     const StridedTensor& counts, const StridedTensor& entries,
                                     int64_t max_blocks, uint64_t offsets, uint64_t compressed_entries,
                                     int64_t entries_per_head, int num_sms) {
  ScheduleArguments arguments{fine_pass(pass), batch, heads, head_dim, grid, listed_grid, block_sizes};
  arguments.lists = make_block_lists(counts, entries, listed_grid.num_cubes());
  arguments.max_blocks = max_blocks;
  arguments.compressed = {pointer<const int32_t>(offsets), pointer<const int32_t>(compressed_entries),
                          entries_per_head};
  arguments.num_sms = num_sms;
  return arguments;
}

}  // namespace
}  // namespace vsa

PYBIND11_MODULE(_C, m) {
  using namespace vsa;
  m.doc() = "Plans and launches of vsa_cuda's kernels; see vsa_cuda/_kernels.py for their use.";
  py::register_exception<ArgumentError>(m, "ArgumentError", PyExc_ValueError);
  py::register_exception<LaunchError>(m, "LaunchError", PyExc_RuntimeError);

  py::class_<TensorMapPlan>(m, "TensorMapPlan")
      .def_readonly("address", &TensorMapPlan::address)
      .def_property_readonly("element_type", [](const TensorMapPlan& map) { return name(map.type); })
      .def_property_readonly("extents",
                             [](const TensorMapPlan& map) { return py::tuple(py::cast(map.extents)); })
      .def_property_readonly("strides",
                             [](const TensorMapPlan& map) { return py::tuple(py::cast(map.strides)); })
      .def_property_readonly("box", [](const TensorMapPlan& map) { return py::tuple(py::cast(map.box)); })
      .def_readonly("swizzle", &TensorMapPlan::swizzle);

  py::class_<LaunchPlan>(m, "LaunchPlan")
      .def_readonly("kernel", &LaunchPlan::kernel)
      .def_property_readonly("grid", [](const LaunchPlan& plan) { return py::tuple(py::cast(plan.grid)); })
      .def_property_readonly("block", [](const LaunchPlan& plan) { return py::tuple(py::cast(plan.block)); })
      .def_property_readonly("cluster",
                             [](const LaunchPlan& plan) { return py::tuple(py::cast(plan.cluster)); })
      .def_readonly("shared_bytes", &LaunchPlan::shared_bytes)
      .def_readonly("maps", &LaunchPlan::maps)
      .def_property_readonly("params", [](const LaunchPlan& plan) { return py::bytes(plan.params); });

  py::class_<CubeGrid>(m, "CubeGrid")
      .def(py::init(&make_grid), py::kw_only(), "video_shape"_a, "cube"_a)
      .def_property_readonly("num_cubes", &CubeGrid::num_cubes)
      .def_property_readonly("num_tokens", &CubeGrid::num_tokens)
      .def(
          "cube_tokens",
          [](const CubeGrid& grid, int cube) {
            std::vector<int64_t> tokens(kCubeTokens);
            for (int slot = 0; slot < kCubeTokens; slot++) tokens[slot] = grid.token(grid.origin(cube), slot);
            return tokens;
          },
          "cube"_a)
      .def(
          "valid_slots", [](const CubeGrid& grid, int cube) { return grid.valid_slots(grid.origin(cube)); },
          "cube"_a);

  py::class_<TokenTensor>(m, "TokenTensor")
      .def(py::init(&token_tensor), py::kw_only(), "address"_a, "shape"_a, "strides"_a, "dtype"_a);

  py::class_<StridedTensor>(m, "StridedTensor")
      .def(py::init<uint64_t, std::vector<int64_t>>(), py::kw_only(), "address"_a, "strides"_a);

  py::class_<Gate>(m, "Gate").def(py::init(&make_gate), py::kw_only(), "values"_a, "scalar"_a, "factor"_a);

  py::class_<Schedule>(m, "Schedule").def(py::init<>(), "Every block has all blocks.");
  py::class_<ScheduleArguments>(m, "ScheduleArguments")
      .def(py::init(&schedule_arguments), py::kw_only(), "kernel"_a, "batch"_a, "heads"_a, "head_dim"_a,
           "grid"_a, "listed_grid"_a, "block_sizes"_a, "counts"_a, "entries"_a, "max_blocks"_a, "offsets"_a,
           "compressed_entries"_a, "entries_per_head"_a, "num_sms"_a)
      .def_property_readonly("num_stages", &num_stages)
      .def_property_readonly("num_tasks", &num_tasks)
      .def_property_readonly("num_counts", &num_counts)
      .def_property_readonly("num_thin", &num_thin)
      .def_readwrite("stages", &ScheduleArguments::stages)
      .def_readwrite("stage_counts", &ScheduleArguments::stage_counts)
      .def_readwrite("thin", &ScheduleArguments::thin)
      .def_property_readonly("schedule", &make_schedule);
  m.def("plan_schedule", &plan_schedule, "arguments"_a);

  m.def("plan_fine_forward", &fine_forward, py::kw_only(), "query"_a, "key"_a, "value"_a, "out"_a,
        "out_fine"_a, "store_out_fine"_a, "q_grid"_a, "kv_grid"_a, "coarse_grid"_a, "schedule"_a,
        "block_sizes"_a, "q_block_sizes"_a, "lse"_a, "coarse"_a, "gate_fine"_a, "gate_coarse"_a, "scale"_a,
        "num_sms"_a);

  m.def("plan_pool", &plan_pool, py::kw_only(), "inputs"_a, "grid"_a, "outputs"_a, "num_sms"_a);
  auto def_select = [&m](const char* name, auto* plan) {
    m.def(name, plan, py::kw_only(), "query"_a, "key"_a, "topk"_a, "scale"_a, "counts"_a, "indices"_a);
  };
  def_select("plan_select", plan_select);
  def_select("plan_select_large", plan_select_large);
  def_select("plan_select_small", plan_select_small);

  m.def("plan_transpose_index", &transpose_index, py::kw_only(), "shape"_a, "kv_num_blocks"_a, "kv_indices"_a,
        "num_kv_blocks"_a, "q_offsets"_a, "q_indices"_a);
  m.def("plan_combine_backward", &combine_backward, py::kw_only(), "grad_out"_a, "out_fine"_a, "q_grid"_a,
        "coarse_grid"_a, "block_sizes"_a, "grad_lse"_a, "coarse"_a, "gate_fine"_a, "gate_coarse"_a,
        "grad_fine"_a, "delta"_a, "grad_coarse"_a, "grad_gate_fine"_a, "grad_gate_coarse"_a, "scalar_fine"_a,
        "scalar_coarse"_a);
  m.def("plan_delta", &delta, py::kw_only(), "grad_out"_a, "out"_a, "grid"_a, "block_sizes"_a, "grad_lse"_a,
        "delta"_a, "num_sms"_a);
  py::class_<FineBackwardArguments>(m, "FineBackwardArguments")
      .def(py::init(&fine_backward_arguments), py::kw_only(), "query"_a, "key"_a, "value"_a, "grad_out"_a,
           "grad_query"_a, "grad_key"_a, "grad_value"_a, "q_grid"_a, "kv_grid"_a, "kv_schedule"_a,
           "q_schedule"_a, "block_sizes"_a, "q_block_sizes"_a, "lse"_a, "delta"_a, "row_terms"_a,
           "grad_query_sums"_a, "adds_directly"_a, "choose_by"_a, "dq_pooled"_a, "dk_pooled"_a, "dv_pooled"_a,
           "pooled_q_grid"_a, "pooled_kv_grid"_a, "scale"_a, "num_sms"_a);
  m.def("plan_fine_backward_kv", &plan_fine_backward_kv, "arguments"_a);
  m.def("plan_fine_backward_q", &plan_fine_backward_q, "arguments"_a);
  m.def("plan_start_grad_query", &plan_start_grad_query, "arguments"_a);
  m.def("plan_fine_backward_fused", &plan_fine_backward_fused, "arguments"_a);
  m.def("plan_finish_grad_query", &plan_finish_grad_query, "arguments"_a);

  m.def("launch", &launch, py::kw_only(), "plan"_a, "device"_a, "stream"_a);
  m.def("kernel_names", &kernel_names);
  m.def("cuda_version", &cuda_version);
}
