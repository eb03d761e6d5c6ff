// What a launch consists of, in plain host data: built and tested without a GPU, launched by launch.cu, or
// executed by tests/simulator.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cube_grid.h"
#include "kernels/token_rows.h"

namespace vsa {

enum class ElementType { kBFloat16, kFloat16, kFloat32 };

const char* name(ElementType type);
int bytes(ElementType type);

// A tensor map in words (cuTensorMapEncodeTiled's arguments): dimension 0 is the innermost, its stride one
// element.
struct TensorMapPlan {
  uint64_t address = 0;
  ElementType type = ElementType::kBFloat16;
  std::vector<uint64_t> extents;  // elements
  std::vector<uint64_t> strides;  // bytes, of dimensions 1 and up
  std::vector<uint32_t> box;      // elements
  int swizzle = 128;              // bytes; 0 for none
};

// A kernel takes two parameters: its tensor maps (left out when there are none), then its params struct.
struct LaunchPlan {
  std::string kernel;
  std::array<uint32_t, 3> grid{1, 1, 1};
  std::array<uint32_t, 3> block{1, 1, 1};
  std::array<uint32_t, 3> cluster{1, 1, 1};
  uint32_t shared_bytes = 0;
  std::vector<TensorMapPlan> maps;
  std::string params;  // the bytes of the params struct

  template <class Params>
  void set_params(const Params& value) {
    params.assign(reinterpret_cast<const char*>(&value), sizeof(Params));
  }
};

// One head's tokens of a [batch, tokens, heads, head_dim] tensor with any strides the copy engine takes.
struct TokenTensor {
  uint64_t address = 0;
  ElementType type = ElementType::kBFloat16;
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  std::array<int64_t, 3> strides{};  // elements: batch, token, head (head_dim's is 1)
};

// A tensor by address and strides in elements; address 0 where it is absent.
struct StridedTensor {
  uint64_t address = 0;
  std::vector<int64_t> strides;
};

// Leaves `strides` alone where the tensor is absent. `dimensions` names them in errors.
void copy_strides(int64_t (&strides)[4], const StridedTensor& tensor, const char* argument,
                  const char* dimensions);

// Same batch, heads, head_dim and type (token counts may differ: queries and keys may come from different
// videos).
void check_same_heads(const TokenTensor& tensor, const TokenTensor& expected, const char* argument);

// A plain array by address; 0 where an optional one is absent.
template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// Another cut of the same tokens.
void check_same_tokens(const CubeGrid& grid, const CubeGrid& expected, const char* argument);

CubeGrid make_grid(std::array<int64_t, 3> video_shape, std::array<int64_t, 3> cube);

// Boxes of one cube by 64 columns over `tensor`, and how a kernel addresses them. `argument` names it in
// errors.
struct CubeMap {
  TensorMapPlan map;
  CubeCoordinates coordinates;
};
CubeMap make_cube_map(const TokenTensor& tensor, const CubeGrid& grid, const char* argument);

// One, or a ListedMaps of them, added to the maps of `plan`.
CubeCoordinates add_cube_map(LaunchPlan& plan, const TokenTensor& tensor, const CubeGrid& grid,
                             const char* argument);
CubeCoordinates add_listed_maps(LaunchPlan& plan, const TokenTensor& tensor, const CubeGrid& grid,
                                const char* argument);
int64_t num_thin_cubes(const CubeGrid& grid);

// Rows that a kernel reads or writes 16 bytes at a time. `argument` names the tensor in errors.
constexpr int kVectorElements = 8;  // of 16 bits
TokenRows make_token_rows(const TokenTensor& tensor, const CubeGrid& grid, const char* argument);

// Kernels exist for head_dim 64 and 128, bf16 and fp16: "<stem>_d128_bf16".
std::string kernel_name(const char* stem, int64_t head_dim, ElementType type);

uint32_t checked_grid(int64_t ctas, const char* kernel);

// CTAs for `items` that they take in turns: as many as run at once, each with as many items, at most one
// less.
uint32_t equal_shares(int64_t items, int ctas_per_sm, int num_sms, const char* kernel);

// Whether CTAs in pairs are done with `rows` heads of `groups` tasks before CTAs on their own, which take
// `rounds`. A paired round takes `paired_time` of another one; where groups are odd, half of a head's last
// pair has nothing to do.
bool pays_in_pairs(int64_t rows, int64_t groups, int num_sms, double paired_time, double rounds);

}  // namespace vsa
