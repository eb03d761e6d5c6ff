// The engine as a Python module: one function that runs one launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "world.h"

namespace py = pybind11;

namespace sim {

namespace {

void read_dims(const py::handle& value, u32* dims) {
  auto values = value.cast<std::vector<u32>>();
  if (values.size() != 3) throw py::value_error("grid, block and cluster have three dimensions");
  std::copy(values.begin(), values.end(), dims);
}

TensorMap read_map(const py::dict& item) {
  TensorMap map;
  map.address = item["address"].cast<u64>();
  map.type = item["element_type"].cast<std::string>();
  map.element_bytes = item["element_bytes"].cast<int>();
  map.extents = item["extents"].cast<std::vector<i64>>();
  map.strides = item["strides"].cast<std::vector<i64>>();
  map.box = item["box"].cast<std::vector<i64>>();
  map.swizzle = item["swizzle"].cast<int>();
  return map;
}

py::dict fault_dict(const Fault& fault) {
  py::dict result;
  result["kind"] = fault.kind;
  result["message"] = std::string(fault.what());
  result["kernel"] = fault.kernel;
  result["cta"] = fault.cta;
  result["warp"] = fault.warp;
  result["lane"] = fault.lane;
  result["ptx_line"] = fault.ptx_line;
  result["source_line"] = fault.source_line;
  return result;
}

struct RegionArgument {
  u64 base, bytes;
  std::string mode;
};

// Returns {"fault": ...} or the report's numbers.
py::dict run(const std::vector<std::string>& texts, const py::dict& plan,
             const std::vector<std::tuple<u64, u64, std::string>>& memory, u64 seed, u64 max_steps,
             u32 resident) {
  Launch launch;
  launch.kernel = plan["kernel"].cast<std::string>();
  read_dims(plan["grid"], launch.grid);
  read_dims(plan["block"], launch.block);
  read_dims(plan["cluster"], launch.cluster);
  launch.shared_bytes = plan["shared_bytes"].cast<u32>();
  std::string params = plan["params"].cast<py::bytes>();
  launch.params.assign(params.begin(), params.end());
  for (const py::handle& item : plan["maps"]) {
    launch.maps.push_back(read_map(py::reinterpret_borrow<py::dict>(item)));
  }
  launch.seed = seed;
  launch.max_steps = max_steps;
  launch.resident = resident;
  py::dict result;
  try {
    py::gil_scoped_release release;
    Module module;
    for (const std::string& text : texts) parse_ptx(text, launch.kernel, module);
    World world(module, launch);
    for (size_t i = 0; i < memory.size(); i++) {
      auto& [base, bytes, mode] = memory[i];
      world.add_region(base, bytes, mode != "r", mode != "w", static_cast<int>(i));
    }
    world.run();
    py::gil_scoped_acquire acquire;
    py::dict opcodes, unwritten;
    for (size_t i = 0; i < world.counts.size(); i++) {
      if (!world.counts[i]) continue;
      py::str name(world.program.entry->insts[i].text);
      u64 before = opcodes.contains(name) ? opcodes[name].cast<u64>() : 0;
      opcodes[name] = before + world.counts[i];
    }
    for (const Region& region : world.regions) {
      if (region.index >= 0 && region.shadow->unwritten()) {
        unwritten[py::int_(region.index)] = region.shadow->unwritten();
      }
    }
    result["instructions"] = world.steps;
    result["opcodes"] = opcodes;
    result["unwritten"] = unwritten;
    result["shared_bytes"] = world.max_shared - world.program.shared_start;
    result["barrier_phases"] = world.barrier_phases;
    result["async_copies"] = world.copies;
    result["matrix_products"] = world.products;
  } catch (const Fault& fault) {
    result["fault"] = fault_dict(fault);
  }
  return result;
}

}  // namespace

}  // namespace sim

PYBIND11_MODULE(simulator_engine, module) {
  module.def("run", &sim::run, py::arg("texts"), py::arg("plan"), py::arg("memory"), py::arg("seed"),
             py::arg("max_steps"), py::arg("resident"));
}
