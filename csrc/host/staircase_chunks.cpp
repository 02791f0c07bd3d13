#include "host/staircase_chunks.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace sorted_kernels {
namespace {

void append(std::vector<Chunk>& chunks, int64_t tensor, int64_t row, int64_t rows, int64_t col,
            int64_t cols) {
  chunks.push_back({row, col, int32_t(rows), int32_t(cols), int32_t(tensor), 0});
}

void cut_columns(std::vector<Chunk>& chunks, int64_t tensor, int64_t row, int64_t begin,
                 int64_t end, int64_t chunk_elements) {
  while (begin < end) {
    const int64_t next = std::min(end, (begin / chunk_elements + 1) * chunk_elements);
    append(chunks, tensor, row, 1, begin, next - begin);
    begin = next;
  }
}

void cut_rows(std::vector<Chunk>& chunks, const Band& band, int64_t chunk_elements) {
  const int64_t rows_per_chunk = std::max<int64_t>(1, chunk_elements / band.cols);
  for (int64_t row = band.row_begin; row < band.row_end; row += rows_per_chunk) {
    const int64_t rows = std::min(rows_per_chunk, band.row_end - row);
    append(chunks, band.tensor, row, rows, 0, band.cols);
  }
}

void check(const Band& band, size_t tensors) {
  const bool valid = band.tensor >= 0 && band.tensor < int64_t(tensors) && band.row_begin >= 0 &&
                     band.row_begin <= band.row_end && band.cols >= 0;
  if (!valid) {
    throw std::invalid_argument(
        "band (" + std::to_string(band.tensor) + ", " + std::to_string(band.row_begin) + ", " +
        std::to_string(band.row_end) + ", " + std::to_string(band.cols) +
        ") must be (tensor, row_begin, row_end, cols) with tensor below " +
        std::to_string(tensors) + ", 0 <= row_begin <= row_end and cols >= 0");
  }
}

}  // namespace

std::vector<Chunk> chunk_staircases(const std::vector<Band>& bands,
                                    const std::vector<int64_t>& row_strides,
                                    int64_t chunk_elements) {
  if (chunk_elements < 1 || chunk_elements > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("chunk_elements=" + std::to_string(chunk_elements) +
                                " must be between 1 and 2^31 - 1");
  }
  std::vector<Chunk> chunks;
  chunks.reserve(2 * bands.size() + count_elements(bands) / chunk_elements);
  for (const Band& band : bands) {
    check(band, row_strides.size());
    if (band.cols == 0) {
      continue;
    }
    if (band.cols == row_strides[band.tensor]) {
      cut_columns(chunks, band.tensor, 0, band.row_begin * band.cols, band.row_end * band.cols,
                  chunk_elements);
    } else if (band.cols <= chunk_elements) {
      cut_rows(chunks, band, chunk_elements);
    } else {
      for (int64_t row = band.row_begin; row < band.row_end; ++row) {
        cut_columns(chunks, band.tensor, row, 0, band.cols, chunk_elements);
      }
    }
  }
  return chunks;
}

int64_t count_elements(const std::vector<Band>& bands) {
  int64_t total = 0;
  for (const Band& band : bands) {
    total += std::max<int64_t>(0, band.row_end - band.row_begin) * std::max<int64_t>(0, band.cols);
  }
  return total;
}

}  // namespace sorted_kernels
