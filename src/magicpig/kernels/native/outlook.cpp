#include "outlook.h"

#include <algorithm>
#include <cmath>

namespace magicpig {
namespace {

constexpr double kAim = 0.85, kSlack = 1.1;  // of epsilon: what a draw is meant to predict, and what it may predict
constexpr int kFinest = 160;                 // eighths of an octave by which a step may become smaller
constexpr int kRound = 8;                    // rows

}  // namespace

void Outlook::look(int64_t candidates, int head_count, const float* logits, int64_t per_head, const float* log_u,
                   const uint32_t* weights, uint64_t own_step) {
  heads = head_count;
  step = own_step;
  const auto n = static_cast<size_t>(candidates);
  u.resize(n);
  w.resize(n);
  terms.resize(n * heads);
  for (size_t i = 0; i < n; ++i) {
    u[i] = std::exp(static_cast<double>(log_u[i]));
    w[i] = weights[i] * u[i];
  }
  for (int h = 0; h < heads; ++h) {
    const float* own = logits + h * per_head;
    const float top = *std::max_element(own, own + n);
    for (size_t i = 0; i < n; ++i) terms[h * n + i] = std::exp(2 * (static_cast<double>(own[i]) - top)) / u[i];
  }
}

bool is_enough(float error, double epsilon, bool first) { return error <= (first ? 1.0 : kSlack) * epsilon; }

int64_t Outlook::more_rows(const float* errors, double epsilon) const {
  const double goal = kAim * epsilon * kAim * epsilon;
  std::vector<double> squares, before, after(heads);
  double worst = 0;
  for (int h = 0; h < heads; ++h) {
    if (!std::isfinite(errors[h])) return rows << 20;
    const double square = static_cast<double>(errors[h]) * errors[h];
    squares.push_back(square / (1 - std::min(square, 0.5)));
    worst = std::max(worst, squares[h]);
  }
  const auto count = static_cast<double>(rows);
  const auto least = static_cast<int64_t>(std::ceil(1.2 * count));
  if (step == 0) return std::max(least, static_cast<int64_t>(std::ceil(count * std::min(worst / goal, 0x1p20))));
  const size_t n = u.size();
  std::vector<double> fall(n);
  const auto left = [&](double t, std::vector<double>* sums) {
    for (size_t i = 0; i < n; ++i) fall[i] = std::max(t / w[i] - 1, 0.0);
    for (int h = 0; h < heads; ++h) {
      double sum = 0;
      for (size_t i = 0; i < n; ++i) sum += terms[h * n + i] * fall[i];
      (*sums)[h] = sum;
    }
  };
  const auto expected = [&](double t) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sum += std::min(w[i] / t, 1.0) / u[i];
    return sum;
  };
  const auto own = static_cast<double>(step);
  before.resize(heads);
  left(own, &before);
  const auto enough = [&](int eighths) {
    const double finer = std::exp2(-eighths / 8.0);
    left(own * finer, &after);
    for (int h = 0; h < heads; ++h) {
      if (squares[h] * (before[h] > 0 ? after[h] / before[h] : finer) > goal) return false;
    }
    return true;
  };
  int low = 0, high = kFinest;
  if (!enough(high)) return rows << 20;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (enough(middle) ? high : low) = middle;
  }
  const double more = expected(own * std::exp2(-high / 8.0)) / expected(own);
  return std::max(least, kRound * static_cast<int64_t>(std::ceil(count * more / kRound)));
}

}  // namespace magicpig
