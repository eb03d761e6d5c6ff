// Softmax over columns that arrive tile by tile, for the 64 rows of a warpgroup; scores in units of log2.
#pragma once

#include <cmath>

#include "tiles/register_tile.cuh"

namespace vsa {

// The reference value of a row follows its maximum lazily: only when a score exceeds it by more than this
// many binary orders, so that most tiles need no rescaling. Probabilities then reach at most 2^8, which fp16
// holds.
constexpr float kRescaleThreshold = 8.0f;

// Keeps the exponentials that `sum` adds up above the caller's wait for a running product, which they are
// meant to run beside: ptxas would move the wait up, but moves none over a store. Sums are never negative.
VSA_DEVICE void settle(const RowVector& sum) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.lt.f32 p, %0, 0f00000000;\n"
      "@p st.shared.f32 [%1], %0;\n"
      "}\n" ::"f"(sum.data[0] + sum.data[1]),
      "r"(0)
      : "memory");
}

class OnlineSoftmax {
 public:
  VSA_DEVICE explicit OnlineSoftmax(float scale_log2) : scale_(scale_log2) {}

  // Takes the maximum of `scores` into the reference. True, for the whole warp alike, if earlier results must
  // be multiplied by `factor`.
  template <int kCols>
  VSA_DEVICE bool update(const FloatTile<kCols>& scores, RowVector& factor) {
    RowVector maximum;
    row_max(maximum, scores);
    bool moved = maximum.data[0] * scale_ > reference_.data[0] + kRescaleThreshold ||
                 maximum.data[1] * scale_ > reference_.data[1] + kRescaleThreshold;
    bool rescale = __any_sync(0xffffffffu, moved);
    if (rescale) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float reference = fmaxf(maximum.data[half] * scale_, reference_.data[half]);
        factor.data[half] =
            reference_.data[half] == -INFINITY ? 0.0f : exp2_approx(reference_.data[half] - reference);
        sum_.data[half] *= factor.data[half];
        reference_.data[half] = reference;
      }
    }
    return rescale;
  }

  // After update: columns kBegin to kEnd - 1 of `scores` become exp2(scale * scores - reference).
  template <int kBegin, int kEnd, int kCols>
  VSA_DEVICE void exponentiate(FloatTile<kCols>& scores) {
    // A row without any key so far: every score is -inf, and so must be the exponent.
    float negative[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      negative[half] = reference_.data[half] == -INFINITY ? 0.0f : -reference_.data[half];
    }
    float sums[4] = {};  // a chain for each column of a group and half
#pragma unroll
    for (int i = kBegin / 2; i < kEnd / 2; i++) {
      scores.data[i] = exp2_approx(fmaf(scores.data[i], scale_, negative[i / 2 % 2]));
      sums[i % 4] += scores.data[i];
    }
    sum_.data[0] += sums[0] + sums[1];
    sum_.data[1] += sums[2] + sums[3];
    settle(sum_);
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
  float scale_;
  RowVector reference_ = {-INFINITY, -INFINITY};  // in log2 units
  RowVector sum_ = {0.0f, 0.0f};                  // this lane's part
};

}  // namespace vsa
