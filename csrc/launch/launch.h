#pragma once

#include "launch/plan.h"

namespace vsa {

// Launches `plan` on a device's stream (a cudaStream_t as an integer). Throws LaunchError, naming kernel and
// device.
void launch(const LaunchPlan& plan, int device, uint64_t stream);

// Names of the kernels in this binary.
std::vector<std::string> kernel_names();

// CUDA runtime version this binary was built with, as CUDA counts (13000 for 13.0).
int cuda_version();

}  // namespace vsa
