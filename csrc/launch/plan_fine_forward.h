#pragma once

#include "kernels/gate.h"
#include "launch/plan_schedule.h"

namespace vsa {

// values [batch, tokens, heads, head_dim] (any strides) or scalar (one fp32) or neither, times factor.
Gate make_gate(const StridedTensor& values, uint64_t scalar, float factor);

struct FineForwardArguments {
  TokenTensor query, key, value, out;
  TokenTensor out_fine;  // any where it is not stored
  bool store_out_fine = false;
  CubeGrid q_grid, kv_grid;
  CubeGrid coarse_grid;                         // of q_grid's tokens
  Schedule schedule{};                          // made for this pass
  uint64_t block_sizes = 0, q_block_sizes = 0;  // int32 [blocks], 0: all of each cube
  uint64_t lse = 0;                             // fp32 [batch, heads, num_q_blocks, 64]
  uint64_t coarse = 0;                          // [batch, heads, coarse cubes, head_dim] packed, or 0
  Gate gate_fine, gate_coarse;
  double scale = 1.0;
  int num_sms = 1;  // of the device: CTAs stay and take task after task
};

LaunchPlan plan_fine_forward(const FineForwardArguments& arguments);

}  // namespace vsa
