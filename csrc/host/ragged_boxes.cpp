#include "host/ragged_boxes.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sorted_kernels {
namespace {

// A thread that is held up then costs the others a part of a job, not half of the product.
constexpr int64_t kJobsPerThread = 3;
// Multiply-adds that are worth a job, and a box of it: some 25 and 3 microseconds of a core.
constexpr int64_t kJobWork = 1 << 21;
constexpr int64_t kBoxWork = 1 << 18;
// Reading an element of the weight takes as long as this many multiply-adds with it.
constexpr int64_t kReadWork = 44;
// Jobs begin at multiples of a cache line of float32.
constexpr int64_t kAlignment = 16;
// A band's rows: their pages are few enough to be remembered.
constexpr int64_t kBandRows = 256;
// A band's share of a frame's narrow leg should have this many elements.
constexpr int64_t kLegElements = 1 << 14;

void check(const std::vector<RowRun>& runs) {
  if (runs.empty()) throw std::invalid_argument("runs is empty; at least one is needed");
  for (size_t i = 0; i < runs.size(); ++i) {
    const RowRun &run = runs[i], &before = runs[i == 0 ? 0 : i - 1];
    if (run.rows < 1 || run.m < 1 || run.k < 1 || run.m > before.m || run.k > before.k) {
      throw std::invalid_argument(
          "runs[" + std::to_string(i) + "] is (" + std::to_string(run.rows) + ", " +
          std::to_string(run.m) + ", " + std::to_string(run.k) +
          "); counts are at least 1, and sizes do not rise from one run to the next");
    }
  }
}

// The staircase without cuts: frames from the innermost, each as two boxes.
std::vector<RaggedBox> frames_of(const std::vector<RowRun>& runs) {
  std::vector<RaggedBox> boxes;
  int64_t rows = 0, m = 0, k = 0;
  for (const RowRun& run : runs) rows += run.rows;
  for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
    if (run->m > m) boxes.push_back({rows, m, run->m, 0, run->k});
    if (run->k > k && m > 0) boxes.push_back({rows, 0, m, k, run->k});
    rows -= run->rows;
    m = run->m;
    k = run->k;
  }
  return boxes;
}

// Where the outputs are cut, so that each part takes about the same time.
std::vector<int64_t> cuts_of(bool by_m, const std::vector<RowRun>& runs, int64_t threads) {
  const size_t count = runs.size();
  // Outputs [sizes[i + 1], sizes[i]) are those of the runs up to the i-th, and take `work[i]` each.
  std::vector<int64_t> sizes(count + 1, 0), work(count);
  int64_t sum = 0, total = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t other = by_m ? runs[i].k : runs[i].m;
    sizes[i] = by_m ? runs[i].m : runs[i].k;
    sum += runs[i].rows * other;
    work[i] = sum + kReadWork * (by_m ? runs[0].k : runs[0].m);
  }
  for (size_t i = 0; i < count; ++i) total += (sizes[i] - sizes[i + 1]) * work[i];
  const int64_t worth = std::max<int64_t>(kJobWork, kBoxWork * count);
  const int64_t jobs =
      std::clamp<int64_t>(total / worth, 1, threads > 1 ? kJobsPerThread * threads : 1);

  std::vector<int64_t> cuts = {0};
  int64_t done = 0;
  for (size_t i = count; i-- > 0;) {
    const int64_t step = (sizes[i] - sizes[i + 1]) * work[i];
    for (int64_t job; (job = cuts.size()) < jobs && total * job / jobs <= done + step;) {
      const int64_t cut = sizes[i + 1] + (total * job / jobs - done) / work[i];
      const int64_t aligned = (cut + kAlignment / 2) / kAlignment * kAlignment;
      cuts.push_back(std::clamp(aligned, cuts.back(), sizes[0]));
    }
    done += step;
  }
  cuts.push_back(sizes[0]);
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

}  // namespace

std::vector<RaggedJob> ragged_jobs(GemmMode mode, const std::vector<RowRun>& runs,
                                   int64_t threads) {
  check(runs);
  const bool by_m = mode != GemmMode::kDgrad;
  const std::vector<RaggedBox> frames = frames_of(runs);
  const std::vector<int64_t> cuts = cuts_of(by_m, runs, threads);
  const int64_t m = runs[0].m, leg = runs[0].k / runs.size() + 1, rows = frames[0].rows;
  const int64_t band = std::max({kBandRows, rows, kLegElements / leg});
  std::vector<RaggedJob> jobs;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    RaggedJob job{cuts[i], cuts[i + 1], {}};
    const int64_t m_begin = by_m ? job.begin : 0, m_end = by_m ? job.end : m;
    for (int64_t top = m_begin; top < m_end; top += band) {
      for (RaggedBox box : frames) {
        box.m_begin = std::max(box.m_begin, top);
        box.m_end = std::min({box.m_end, top + band, m_end});
        if (!by_m) {
          box.k_begin = std::max(box.k_begin, job.begin);
          box.k_end = std::min(box.k_end, job.end);
        }
        if (box.m_begin < box.m_end && box.k_begin < box.k_end) job.boxes.push_back(box);
      }
    }
    jobs.push_back(std::move(job));
  }
  return jobs;
}

}  // namespace sorted_kernels
