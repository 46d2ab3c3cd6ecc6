#include "store.h"

#include <algorithm>
#include <cmath>

namespace magicpig {
namespace {

constexpr int kSegmentBlocks = kSegmentRows / kBlockRows;

// Copies centre [G][head_dim] to number `i` of each head's `count` in `to` [G][count][dim].
void copy_centre(const StoreView& store, const float* centre, int64_t i, int64_t count, std::vector<float>& to) {
  for (int g = 0; g < store.heads; ++g) {
    std::copy_n(centre + static_cast<int64_t>(g) * store.head_dim, store.head_dim,
                to.begin() + (g * count + i) * store.dim);
  }
}

}  // namespace

void StoreView::set_blocks(std::vector<Block> own) {
  blocks = std::move(own);
  row_blocks.resize(blocks.size() * heads);
  for (int g = 0; g < heads; ++g) {
    for (size_t b = 0; b < blocks.size(); ++b) {
      row_blocks[g * blocks.size() + b] = blocks[b].rows + g * blocks[b].head_stride;
    }
  }
  row_centres.clear();
  hashed_from_by_ = nullptr;
}

void StoreView::set_row_centres(const std::vector<const float*>& centres) {
  row_centres.assign(centres.empty() ? 0 : static_cast<size_t>(heads) * blocks.size() * dim, 0.0f);
  for (size_t b = 0; b < centres.size(); ++b) copy_centre(*this, centres[b], b, blocks.size(), row_centres);
  hashed_from_by_ = nullptr;
}

void StoreView::set_segments(std::vector<IndexSegment> own, const std::vector<const float*>& centres) {
  segments = std::move(own);
  const int64_t ranges = segments.empty() || centres.empty() ? 0 : segments.back().first / kSegmentRows + 1;
  hash_centres.assign(heads * ranges * dim, 0.0f);
  for (size_t i = 0; i < centres.size(); ++i) {
    copy_centre(*this, centres[i], segments[i].first / kSegmentRows, ranges, hash_centres);
  }
  hashed_from_by_ = nullptr;
}

int64_t StoreView::hashed_from_count() const {
  return row_centres.empty() ? ranges() : (indexed_to + kBlockRows - 1) / kBlockRows;
}

const float* StoreView::hash_centre(int64_t i, int head) const {
  if (hash_centres.empty()) return nullptr;
  const int64_t range = row_centres.empty() ? i : i / kSegmentBlocks;
  return hash_centres.data() + (head * ranges() + range) * dim;
}

void StoreView::prepare_hashed_from() {
  const int64_t count = hashed_from_count(), all = heads * count * dim;
  if (hashed_from_by_ == &kernels() && static_cast<int64_t>(hashed_from_.size()) == all) return;
  hashed_from_.resize(all);
  alignas(64) float centre[kMaxDim];
  for (int64_t i = 0; i < heads * count; ++i) {
    const int g = static_cast<int>(i / count);
    const float *hashed = hash_centre(i % count, g), *row = row_centre(i % count, g);
    for (int d = 0; d < dim; ++d) {
      centre[d] = (hashed == nullptr ? 0.0f : hashed[d]) - (row == nullptr ? 0.0f : row[d]);
    }
    kernels().to_lane_order(dtype, centre, dim, hashed_from_.data() + i * dim);
  }
  hashed_from_by_ = &kernels();
}

RowCentres StoreView::hashed_from(int head) const {
  if (hashed_from_.empty()) return {nullptr, nullptr, 0};
  return {hashed_from_.data() + head * hashed_from_count() * dim, nullptr,
          row_centres.empty() ? kSegmentShift : kBlockShift};
}

void PredictedErrors::add(double error) {
  if (!std::isfinite(error)) {
    ++unknown;
    return;
  }
  ++count;
  sum += error;
  largest = std::max(largest, error);
  const double bin = std::ceil(kBinsPerOctave * (std::log2(std::max(error, 1e-9)) + 12)) - 1;
  ++bins[static_cast<size_t>(std::clamp(bin, 0.0, kBins - 1.0))];
}

}  // namespace magicpig
