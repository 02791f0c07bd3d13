// Optimizer steps over a chunk table on the CPU, one implementation per instruction set.
#pragma once

#include "common/optimizer_table.h"

namespace sorted_kernels {

// Updates chunks[0:count]; false when the types have no kernel. Threads may share a table as long
// as their chunks are disjoint.
using AdamWLoop = bool (*)(const TensorRecord* tensors, const Chunk* chunks, int64_t count,
                           UpdateTypes types, const AdamWOptions& options);
using SgdLoop = bool (*)(const TensorRecord* tensors, const Chunk* chunks, int64_t count,
                         UpdateTypes types, const SgdOptions& options);

struct OptimizerLoops {
  AdamWLoop adamw;
  SgdLoop sgd;
};

namespace portable {
extern const OptimizerLoops loops;
}
#if defined(SORTED_KERNELS_X86)
namespace avx2 {
extern const OptimizerLoops loops;
}
#endif

// The fastest loops that this processor can run.
const OptimizerLoops& optimizer_loops();

}  // namespace sorted_kernels
