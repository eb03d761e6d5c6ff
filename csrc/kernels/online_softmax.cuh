// Softmax over columns that arrive tile by tile, for the 64 rows of a warpgroup.
#pragma once

#include <cmath>

#include "tiles/wgmma.cuh"

namespace vsa {

// The reference value of a row need not be its maximum: any will do for which no exponential leaves the range
// of its type. It is the maximum of the first tile, and is raised where a lane's part of a row's sum in one
// tile has come out larger than this. Most tiles then need neither a maximum nor a rescaling.
template <class T>
constexpr float kMostSum = std::is_same_v<T, bf16> ? 0x1p60f : 0x1p15f;

// A lane's sums of its two rows, in two chains each, so that no addition waits for the last one.
struct RowChains {
  float data[4] = {};

  VSA_DEVICE RowVector rows() const { return {data[0] + data[1], data[2] + data[3]}; }
};

class OnlineSoftmax {
 public:
  VSA_DEVICE explicit OnlineSoftmax(float scale_log2) : scale_(scale_log2) {}

  // The reference becomes the maximum of `scores`, where that is higher. Earlier results must be multiplied
  // by `factor`.
  template <int kCols>
  VSA_DEVICE void raise_to_maximum(const FloatTile<kCols>& scores, RowVector& factor) {
    RowVector maximum;
    row_max(maximum, scores);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float highest = std::isnan(maximum.data[half]) ? 0.0f : maximum.data[half] * scale_;
      raise(half, fmaxf(highest, reference_.data[half]), factor);
    }
  }

  // Columns kFrom to kTo - 1 of `scores` become exp2(scale * scores - reference), and are added to `sums`.
  template <int kFrom, int kTo, int kCols>
  VSA_DEVICE void exponentiate(FloatTile<kCols>& scores, RowChains& sums) const {
    // A row without any key so far: every score is -inf, and so must be the exponent.
    float negative[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      negative[half] = reference_.data[half] == -INFINITY ? 0.0f : -reference_.data[half];
    }
#pragma unroll
    for (int i = kFrom / 2; i < kTo / 2; i++) {
      scores.data[i] = exp2_approx(fmaf(scores.data[i], scale_, negative[i / 2 % 2]));
      sums.data[i % 4] += scores.data[i];
    }
  }

  // Whether the reference is too low for a tile of these sums; for the whole warp alike. A row of NaN, say of
  // a pad, stays so whatever its reference: it costs the rows beside it nothing.
  template <class T>
  VSA_DEVICE bool exceeded(const RowVector& sums) const {
    bool low = sums.data[0] > kMostSum<T> || sums.data[1] > kMostSum<T> || reference_.data[0] == -INFINITY ||
               reference_.data[1] == -INFINITY;
    return __any_sync(0xffffffffu, low);
  }

  VSA_DEVICE void add(const RowVector& sums) {
    sum_.data[0] += sums.data[0];
    sum_.data[1] += sums.data[1];
  }

  // Complete sums of exponentials; once, at the end.
  VSA_DEVICE void finish() {
    for (int half = 0; half < 2; half++) sum_.data[half] = quad_sum(sum_.data[half]);
  }

  // What results are multiplied by at the end; 0 for a row without keys.
  VSA_DEVICE float normaliser(int half) const {
    return sum_.data[half] > 0.0f ? 1.0f / sum_.data[half] : sum_.data[half];
  }

  // Natural log of the sum of exp(scale * scores); -inf for a row without keys.
  VSA_DEVICE float lse(int half) const {
    constexpr float kLn2 = 0.693147180559945f;
    return sum_.data[half] == 0.0f ? -INFINITY : (reference_.data[half] + log2f(sum_.data[half])) * kLn2;
  }

 private:
  VSA_DEVICE void raise(int half, float reference, RowVector& factor) {
    factor.data[half] =
        reference_.data[half] == -INFINITY ? 0.0f : exp2_approx(reference_.data[half] - reference);
    sum_.data[half] *= factor.data[half];
    reference_.data[half] = reference;
  }

  float scale_;
  RowVector reference_ = {-INFINITY, -INFINITY};  // in log2 units
  RowVector sum_ = {0.0f, 0.0f};                  // this lane's part
};

}  // namespace vsa
