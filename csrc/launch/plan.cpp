#include "launch/plan.h"

#include <algorithm>
#include <limits>

#include "launch/check.h"

namespace vsa {

namespace {

constexpr int64_t kMaxCoordinate = std::numeric_limits<int32_t>::max();
constexpr uint64_t kMaxMapStride = uint64_t(1) << 40;
constexpr uint64_t kMaxMapExtent = uint64_t(1) << 32;

// A dimension of length 1 may carry any stride in torch; the map takes this one.
int64_t normal_stride(int64_t length, int64_t stride, int64_t packed) { return length > 1 ? stride : packed; }

int log2_of(int64_t x) {
  int result = 0;
  while (int64_t(1) << result < x) result++;
  return result;
}

}  // namespace

const char* name(ElementType type) {
  switch (type) {
    case ElementType::kBFloat16:
      return "bfloat16";
    case ElementType::kFloat16:
      return "float16";
    default:
      return "float32";
  }
}

int bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

CubeGrid make_grid(std::array<int64_t, 3> video_shape, std::array<int64_t, 3> cube) {
  int64_t volume = 1;
  for (int i = 0; i < 3; i++) {
    check_argument(video_shape[i] >= 1 && video_shape[i] <= kMaxCoordinate, "video_shape[", i, "]: got ",
                   video_shape[i], ", expected 1 to 2^31 - 1");
    check_argument(cube[i] >= 1 && cube[i] <= kCubeTokens && 1 << log2_of(cube[i]) == cube[i], "cube[", i,
                   "]: got ", cube[i], ", expected a power of two from 1 to 64");
    volume *= cube[i];
  }
  check_argument(volume == kCubeTokens, "cube: got a volume of ", volume, ", expected 64");
  CubeGrid grid;
  auto extent = [](const std::array<int64_t, 3>& x) {
    return Extent3{int32_t(x[0]), int32_t(x[1]), int32_t(x[2])};
  };
  auto cubes_along = [&video_shape, &cube](int i) { return (video_shape[i] + cube[i] - 1) / cube[i]; };
  grid.video = extent(video_shape);
  grid.log2_cube = {log2_of(cube[0]), log2_of(cube[1]), log2_of(cube[2])};
  grid.cubes = extent({cubes_along(0), cubes_along(1), cubes_along(2)});
  grid.reciprocal_w = CubeGrid::reciprocal(grid.cubes.w);
  grid.reciprocal_h = CubeGrid::reciprocal(grid.cubes.h);
  double cubes = double(grid.cubes.t) * grid.cubes.h * grid.cubes.w;
  check_argument(cubes < double(kMaxCoordinate) / kCubeTokens, "video_shape: got ", cubes,
                 " cubes, expected fewer than 2^25");
  grid.total_cubes = int32_t(cubes);
  return grid;
}

CubeMap make_cube_map(const TokenTensor& tensor, const CubeGrid& grid, const char* argument) {
  const int64_t element = bytes(tensor.type);
  check_argument(tensor.address != 0, argument, ": got a null pointer, expected device memory");
  check_argument(tensor.address % 16 == 0, argument,
                 ": got an address that is not 16-byte aligned; copy the tensor");
  check_argument(tensor.tokens == grid.num_tokens(), argument, ": got ", tensor.tokens, " tokens, expected ",
                 grid.num_tokens(), " = T * H * W");
  int64_t token = normal_stride(tensor.tokens, tensor.strides[1], tensor.head_dim);
  int64_t head = normal_stride(tensor.heads, tensor.strides[2], tensor.head_dim);
  int64_t batch = normal_stride(tensor.batch, tensor.strides[0], tensor.heads * head);
  for (int64_t stride : {token, head, batch}) {
    check_argument(stride > 0 && stride * element % 16 == 0, argument, ": got a stride of ", stride,
                   " elements, expected a positive multiple of ", 16 / element,
                   " (16 bytes); make the tensor contiguous");
  }

  // The head goes into the outermost coordinate where one stride can serve batch and head together, else into
  // the columns.
  CubeMap result;
  uint64_t columns = tensor.head_dim, outer = tensor.batch;
  int64_t outer_stride = batch;
  if (tensor.batch == 1 || batch == tensor.heads * head) {
    result.coordinates = {0, 1, int32_t(tensor.heads)};
    outer = tensor.batch * tensor.heads;
    outer_stride = head;
  } else {
    columns = (tensor.heads - 1) * head + tensor.head_dim;
    check_argument(int64_t(columns) <= kMaxCoordinate, argument, ": got heads ", head,
                   " elements apart in a batch of ", tensor.batch,
                   ", too far for the copy engine; make the tensor contiguous or call per batch entry");
    result.coordinates = {int32_t(head), 0, 1};
  }

  TensorMapPlan& map = result.map;
  map.address = tensor.address;
  map.type = tensor.type;
  map.extents = {columns, uint64_t(grid.video.w), uint64_t(grid.video.h), uint64_t(grid.video.t), outer};
  map.strides = {uint64_t(token) * element, uint64_t(token) * grid.video.w * element,
                 uint64_t(token) * grid.video.w * grid.video.h * element, uint64_t(outer_stride) * element};
  map.box = {64, 1u << grid.log2_cube.w, 1u << grid.log2_cube.h, 1u << grid.log2_cube.t, 1};
  for (uint64_t extent : map.extents) {
    check_argument(extent <= kMaxMapExtent, argument, ": got a dimension of ", extent,
                   " elements, expected at most 2^32");
  }
  for (uint64_t& stride : map.strides) {
    check_argument(stride < kMaxMapStride, argument, ": got a stride of ", stride,
                   " bytes, expected less than 2^40");
  }
  return result;
}

CubeCoordinates add_cube_map(LaunchPlan& plan, const TokenTensor& tensor, const CubeGrid& grid,
                             const char* argument) {
  CubeMap map = make_cube_map(tensor, grid, argument);
  plan.maps.push_back(map.map);
  return map.coordinates;
}

CubeCoordinates add_listed_maps(LaunchPlan& plan, const TokenTensor& tensor, const CubeGrid& grid,
                                const char* argument) {
  CubeCoordinates coordinates = add_cube_map(plan, tensor, grid, argument);
  const TensorMapPlan cube = plan.maps.back();
  for (int dimension : {3, 2, 1}) {  // of the map: t, h, w
    TensorMapPlan thin = cube;
    thin.box[dimension] = std::max(thin.box[dimension] / 4, 1u);  // of shorter sides none is thin
    plan.maps.push_back(thin);
  }
  return coordinates;
}

int64_t num_thin_cubes(const CubeGrid& grid) {
  Extent3 last = {(grid.cubes.t - 1) << grid.log2_cube.t, (grid.cubes.h - 1) << grid.log2_cube.h,
                  (grid.cubes.w - 1) << grid.log2_cube.w};
  int64_t t = grid.cubes.t - (grid.thin_side({last.t, 0, 0}) == 0);
  int64_t h = grid.cubes.h - (grid.thin_side({0, last.h, 0}) == 1);
  int64_t w = grid.cubes.w - (grid.thin_side({0, 0, last.w}) == 2);
  return grid.num_cubes() - t * h * w;
}

TokenRows make_token_rows(const TokenTensor& tensor, const CubeGrid& grid, const char* argument) {
  check_argument(tensor.tokens == grid.num_tokens(), argument, ": got ", tensor.tokens, " tokens, expected ",
                 grid.num_tokens(), " = T * H * W");
  check_argument(tensor.address != 0 && tensor.address % 16 == 0, argument,
                 ": got an address that is null or not 16-byte aligned; copy the tensor");
  TokenRows rows{pointer<void>(tensor.address), {}};
  const int64_t lengths[3] = {tensor.batch, tensor.tokens, tensor.heads};
  for (int i = 0; i < 3; i++) {
    int64_t stride = lengths[i] > 1 ? tensor.strides[i] : 0;
    check_argument(stride % kVectorElements == 0, argument, ": got a stride of ", stride,
                   " elements, expected a multiple of 8 (16 bytes); make the tensor contiguous");
    rows.strides[i] = stride;
  }
  return rows;
}

void check_same_heads(const TokenTensor& tensor, const TokenTensor& expected, const char* argument) {
  auto words = [](const TokenTensor& x) {
    return text("batch ", x.batch, ", heads ", x.heads, ", head_dim ", x.head_dim, ", ", name(x.type));
  };
  check_argument(words(tensor) == words(expected), argument, ": got ", words(tensor), ", expected ",
                 words(expected), " as query has");
}

void check_same_tokens(const CubeGrid& grid, const CubeGrid& expected, const char* argument) {
  check_argument(grid.num_tokens() == expected.num_tokens(), argument, ": got ", grid.num_tokens(),
                 " tokens, expected the ", expected.num_tokens(),
                 " of the fine stage; pass the shape of the same video");
}

std::string kernel_name(const char* stem, int64_t head_dim, ElementType type) {
  check_argument(head_dim == 64 || head_dim == 128, "head_dim: got ", head_dim, ", expected 64 or 128");
  check_argument(type != ElementType::kFloat32, "dtype: got float32, expected bfloat16 or float16");
  return text(stem, "_d", head_dim, type == ElementType::kBFloat16 ? "_bf16" : "_fp16");
}

uint32_t checked_grid(int64_t ctas, const char* kernel) {
  check_argument(ctas > 0 && ctas <= kMaxCoordinate, kernel, ": got a problem of ", ctas,
                 " CTAs, expected 1 to 2^31 - 1; an empty tensor has nothing to compute");
  return uint32_t(ctas);
}

uint32_t equal_shares(int64_t items, int ctas_per_sm, int num_sms, const char* kernel) {
  check_argument(num_sms > 0, "num_sms: got ", num_sms, ", expected at least 1");
  checked_grid(items, kernel);
  int64_t share = ceil_div(items, int64_t(num_sms) * ctas_per_sm);
  return uint32_t(ceil_div(items, share));
}

void copy_strides(int64_t (&strides)[4], const StridedTensor& tensor, const char* argument,
                  const char* dimensions) {
  if (tensor.address == 0) return;
  check_argument(tensor.strides.size() == 4, argument, ": got ", tensor.strides.size(),
                 " dimensions, expected ", dimensions);
  for (int i = 0; i < 4; i++) strides[i] = tensor.strides[i];
}

bool pays_in_pairs(int64_t rows, int64_t groups, int num_sms, double paired_time, double rounds) {
  int64_t pairs = num_sms / 2;
  if (groups == 1 || pairs == 0) return false;
  return paired_time * double(ceil_div(rows * ceil_div(groups, 2), pairs)) < rounds;
}

}  // namespace vsa
