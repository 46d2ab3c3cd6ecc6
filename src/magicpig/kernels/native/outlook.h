// What the candidates of a draw say of larger ones: see more_rows in kernels/sketch/reference.py.
#pragma once

#include <cstdint>
#include <vector>

namespace magicpig {

constexpr int64_t kFirstRows = 64;       // of a step with an epsilon
constexpr int64_t kFirstCandidates = 4;  // for each of these

struct Outlook {
  int64_t rows = 0;           // of the draw
  int heads = 0;              // whose errors count
  uint64_t step = 0;          // of its second phase; 0: there was none
  std::vector<double> u, w;   // of each candidate: its probability in the first phase, and that times its weight
  std::vector<double> terms;  // [head][candidate]: the square of its share over u

  // logits: of head h at logits[h * per_head ..]
  void look(int64_t candidates, int head_count, const float* logits, int64_t per_head, const float* log_u,
            const uint32_t* weights, uint64_t own_step);
  // How many rows to draw where these predict `errors` of the heads, one of them too large.
  int64_t more_rows(const float* errors, double epsilon) const;
};

// Whether the error that a draw predicts is small enough.
bool is_enough(float error, double epsilon, bool first);

}  // namespace magicpig
