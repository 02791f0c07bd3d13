// What the bindings call to run the CUDA optimizer kernels; no CUDA header needed.
#pragma once

#include "common/optimizer_table.h"

namespace sorted_kernels {

// Chunk size for a call on `elements` elements: small enough to keep every multiprocessor of
// `device` busy, large enough to keep the chunk table short.
int64_t cuda_chunk_elements(int64_t elements, int device);

// Enqueue on `stream`. The tables are in device memory and have to stay valid until the kernel has
// run. Return null, or what went wrong as a string that lives for ever.
const char* launch_adamw(const TensorRecord* tensors, const Chunk* chunks, int64_t chunk_count,
                         UpdateTypes types, const AdamWOptions& options, int device, void* stream);
const char* launch_sgd(const TensorRecord* tensors, const Chunk* chunks, int64_t chunk_count,
                       UpdateTypes types, const SgdOptions& options, int device, void* stream);

// Whether a CUDA graph is being captured on the stream.
bool is_capturing(void* stream);

}  // namespace sorted_kernels
